from fidelity.conftest import models, one_thread

__all__ = ["models", "one_thread"]
