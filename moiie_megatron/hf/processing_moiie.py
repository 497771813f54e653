"""Text and images to the inputs of an exported MoIIE model."""

from __future__ import annotations

from typing import Any, Literal

from .version_moiie import TESTED_VERSIONS  # noqa: F401  # first: older versions lack names below

# isort: split

import os

import transformers
from PIL import Image
from transformers import ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import ChannelDimension, make_flat_list_of_images
from transformers.processing_utils import MultiModalData
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import is_torch_tensor

from .pixels_moiie import as_rgb, as_square, upright


class MoiieProcessor(ProcessorMixin):
    """Text and images to model inputs.

    Every ``image_token`` in the text becomes the ids of one image; ``mm_token_type_ids`` marks
    them in the result.

    Rows are padded at the left, as generation needs it (``padding_side="right"`` in a call for
    other uses).  Images are prepared as in training, with PIL whatever else is installed.

    Args:
        image_processor: The vision encoder's; gives image size, mean and standard deviation.
        tokenizer: Must know ``image_token``; gets its end-of-text token for padding where it has
            no padding token.
        num_image_tokens: Ids per image.
        image_mode: ``square`` stretches an image to a square, ``pad`` first pastes it in the
            middle of a square of the mean colour.
        image_token: Stands for an image in the text.
        chat_template: Default: the tokenizer's.

    Raises:
        ValueError: The tokenizer does not know ``image_token``, an unknown ``image_mode``, or an
            image processor without one size for both sides.
    """

    return_mm_token_type_ids = True

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        num_image_tokens: int = 0,
        image_mode: Literal["square", "pad"] = "square",
        image_token: str = "<image>",
        chat_template: str | None = None,
    ) -> None:
        if image_mode not in ("square", "pad"):
            raise ValueError(f"image_mode is {image_mode}: use square or pad.")
        self.num_image_tokens = num_image_tokens
        self.image_mode = image_mode
        self.image_token = image_token
        self.image_token_id = _token_id(tokenizer, image_token)
        # transformers forgets a padding side that was only assigned when it saves a tokenizer.
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        image_processor = _with_pil(image_processor)
        self.image_size = _side(image_processor)
        template = chat_template or tokenizer.chat_template
        super().__init__(image_processor, tokenizer, chat_template=template)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """As in transformers, but a text that begins with the BOS token gets no second one.

        Raises:
            ValueError: Other numbers of image tokens in the texts and of images.  Before 5.23 only
                for too few images; the model then refuses the others.
        """
        texts, bos = [text] if isinstance(text, str) else text, self.tokenizer.bos_token
        if bos and texts and all(isinstance(t, str) and t.startswith(bos) for t in texts):
            kwargs.setdefault("add_special_tokens", False)
        # transformers before 5.23 does not know the class attribute.
        if not hasattr(ProcessorMixin, "return_mm_token_type_ids"):
            kwargs.setdefault("return_mm_token_type_ids", self.return_mm_token_type_ids)
        try:
            return super().__call__(images=images, text=text, **kwargs)
        except StopIteration as error:  # before 5.23
            raise ValueError(
                f"The texts have more {self.image_token} tokens than there are images: pass one "
                "image for each."
            ) from error

    def apply_chat_template(
        self, conversation: Any, *arguments: Any, processor_kwargs: Any = None, **kwargs: Any
    ) -> Any:
        """As in transformers; the template writes all special tokens, none are added."""
        processor_kwargs = {"add_special_tokens": False} | (processor_kwargs or {})
        return super().apply_chat_template(
            conversation, *arguments, processor_kwargs=processor_kwargs, **kwargs
        )

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        """What stands in the text for one image (called by transformers)."""
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **_: Any) -> MultiModalData:
        """Tokens and patches of images of these sizes (called by vLLM)."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count
        )

    def prepare_inputs_layout(
        self, images: Any = None, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any, Any]:
        """Opens image files (called by transformers, whose own reader clips pixels of 16 bits)."""
        return super().prepare_inputs_layout(_with_files_opened(images), *args, **kwargs)

    def _process_images(
        self, images: Any, input_data_format: str | None = None, **kwargs: Any
    ) -> tuple[Any, list[str]]:
        flat = make_flat_list_of_images(images)
        prepared = [self._prepared(image, input_data_format) for image in flat]
        size = {"height": self.image_size, "width": self.image_size}
        kwargs |= {
            "do_resize": True,
            "size": size,
            "resample": Image.Resampling.BICUBIC,
            "do_center_crop": False,
        }
        return super()._process_images(prepared, **kwargs)

    def _prepared(self, image: Any, input_data_format: str | None) -> Image.Image:
        """Upright, RGB, and square in ``pad`` mode."""
        if not isinstance(image, Image.Image):
            image = to_pil_image(
                image, input_data_format=input_data_format or _channel_dimension(image)
            )
        rgb = as_rgb(upright(image))
        if self.image_mode == "square":
            return rgb
        return as_square(rgb, self.image_size, self.image_processor.image_mean)


def _with_files_opened(images: Any) -> Any:
    """The same (nested) list with a picture for the path of a file; addresses are left alone."""
    if isinstance(images, (list, tuple)):
        return [_with_files_opened(image) for image in images]
    if isinstance(images, str) and os.path.isfile(images):
        return Image.open(images)
    return images


def _channel_dimension(image: Any) -> ChannelDimension | None:
    """Where the channels of an array are; None: only one side can be the channels.

    An array of 3 x w x 3 or 1 x w x 3 values is read as its kind usually is: numpy arrays have the
    channels last, tensors first.
    """
    ambiguous = image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[-1] in (1, 3)
    if not ambiguous:
        return None
    return ChannelDimension.FIRST if is_torch_tensor(image) else ChannelDimension.LAST


def _token_id(tokenizer: PreTrainedTokenizerBase, image_token: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(image_token)
    if token_id is None or tokenizer.convert_ids_to_tokens(token_id) != image_token:
        raise ValueError(
            f"The tokenizer does not know the image token {image_token}: add it as a special token."
        )
    return token_id


def _with_pil(image_processor: BaseImageProcessor) -> BaseImageProcessor:
    """The same processor on PIL: torchvision, where installed, resizes to other pixels."""
    if image_processor.backend == "pil":
        return image_processor
    pil_class = getattr(transformers, type(image_processor).__name__ + "Pil")
    return pil_class.from_dict(image_processor.to_dict())


def _side(image_processor: BaseImageProcessor) -> int:
    """Pixels per side.  CLIP's published processors crop to a square, the others resize to it."""
    size = image_processor.size
    if not size.height and getattr(image_processor, "crop_size", None):
        size = image_processor.crop_size
    if not size.height or size.height != size.width:
        raise ValueError(f"The image processor's size is {size}: use one height and equal width.")
    return size.height
