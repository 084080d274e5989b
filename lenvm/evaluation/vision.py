"""Images of prompts as the backbone of a vision-language LenVM takes them, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lenvm.evaluation.errors import EvaluationError

if TYPE_CHECKING:
    from torch import Tensor


class ImageReader:
    """Reads images with the image processor that lies beside a LenVM.

    Args:
        lenvm: directory of the length value model.
        config: its configuration.

    Raises:
        EvaluationError: if its backbone reads no images, or the directory has no image processor.
    """

    def __init__(self, lenvm: Path, config: Any) -> None:
        from transformers import AutoImageProcessor

        image_token = getattr(config, "image_token_id", None)
        if image_token is None:
            raise EvaluationError(f"the samples have images and the LenVM {lenvm} reads none; leave such rows out.")
        self.image_token = int(image_token)
        self._merged = int(config.vision_config.spatial_merge_size) ** 2
        try:
            self._processor = AutoImageProcessor.from_pretrained(str(lenvm))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise EvaluationError(
                f"the LenVM {lenvm} has no image processor that can be read ({reason}); copy the base model's "
                "preprocessor files into it."
            ) from None

    def prompt(self, prompt: Sequence[int], images: Sequence[Path]) -> tuple[list[int], dict[str, Tensor]]:
        """A prompt with all tokens of its images, and what the vision tower reads.

        Args:
            prompt: token ids with all tokens of every image, or with one for each.
            images: files, in the order of their places.

        Returns:
            token ids; `pixel_values` and `image_grid_thw`.

        Raises:
            EvaluationError: for an image that cannot be opened, or one that makes another number of tokens.
        """
        from PIL import Image

        opened = []
        for path in images:
            try:
                with Image.open(path) as image:
                    opened.append(image.convert("RGB"))
            except OSError as error:
                raise EvaluationError(f"the image {path} cannot be opened ({error}); put it back.") from None
        seen = dict(self._processor(images=opened, return_tensors="pt"))
        counts = [int(grid.prod()) // self._merged for grid in seen["image_grid_thw"]]
        marks = sum(token == self.image_token for token in prompt)
        if marks == sum(counts):
            return list(prompt), seen
        if marks != len(counts):
            raise EvaluationError(
                f"a prompt has {marks} tokens of images, and its {len(counts)} images make {sum(counts)}; the LenVM's "
                "image processor must have the pixel limits of the server that sampled."
            )
        sizes = iter(counts)
        return [t for token in prompt for t in [token] * (next(sizes) if token == self.image_token else 1)], seen
