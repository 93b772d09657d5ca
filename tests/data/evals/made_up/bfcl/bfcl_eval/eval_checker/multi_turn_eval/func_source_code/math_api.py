"""A service without state, for tests."""


class MathAPI:
    """Adds numbers."""

    def sum_values(self, numbers: list[float]) -> dict[str, float]:
        """Their sum."""
        return {"result": sum(numbers)}
