"""Pictures of a request: how many, and how many pixels and tokens, before any is decoded."""

from types import SimpleNamespace
from typing import Any

import pytest

from halfbyte.errors import RequestError
from halfbyte.server.api import prompts
from halfbyte.server.config import Limits

LAYOUT = SimpleNamespace(
    size=lambda width, height: (width, height),
    num_tokens=lambda height, width: height * width // 100,
)


def backend(**limits: int) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(limits=Limits(**limits), max_model_len=1000),
        chat=SimpleNamespace(image_layout=LAYOUT),
    )


def messages(num_images: int) -> list[dict[str, Any]]:
    """Two turns, so that neither holds all pictures."""
    parts = [{"type": "image_url", "image_url": f"data:{n}"} for n in range(num_images)]
    half = num_images // 2
    return [{"content": parts[:half]}, {"content": "words"}, {"content": parts[half:]}]


@pytest.mark.parametrize(
    "num_images, side, limits, said",
    [
        (5, 10, {"images": 4}, "images"),
        (5, 10, {"images": 9, "request_pixels": 499}, "pixels of images"),
        (10, 100, {"images": 99}, "alone need 1000"),
    ],
)
async def test_pictures_beyond_a_bound_are_refused_before_any_is_decoded(
    num_images: int, side: int, limits: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_opened = 0

    async def opened(*_: Any) -> Any:
        nonlocal num_opened
        num_opened += 1
        return SimpleNamespace(width=side, height=side)

    monkeypatch.setattr(prompts, "_open_image", opened)
    with pytest.raises(RequestError, match=said) as found:
        await prompts._resolve_images(backend(**limits), messages(num_images))
    assert found.value.param == "messages"
    # The one beyond the number allowed is not even opened.
    assert num_opened == min(num_images, limits["images"])
