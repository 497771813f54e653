"""LoRA on an exported model with peft: attention and experts; merged back on request.

The samples are those of training: the same records, template, labels and pixels.  Needs the
packages peft and accelerate: ``pip install -e .[lora]``.

    python examples/lora.py runs/smollm2/export --records train.json --images images --out adapter
    python examples/lora.py runs/smollm2/export --out adapter --merge runs/smollm2/merged
    python tools/convert.py import --hf runs/smollm2/merged --out runs/smollm2/checkpoint

A second call goes on from the last checkpoint of the first one (``--save-steps``).
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moiie_megatron.cli.program import run_program
from moiie_megatron.utils.directories import check_output, new_directory
from moiie_megatron.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from moiie_megatron.data.stream.dataset import LlavaDataset

# What a target is called in the decoder: modules, or parameters that hold all experts of a layer.
MODULES = {
    "attention": r"self_attn\.\w+_proj",
    "ffn": r"mlp\.\w+_proj",  # of the layers without experts
    "connector": r"linear_[12]",
}
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
WEIGHTS = re.compile(r".*\.safetensors(\.index\.json)?|.*\.bin")
MARKER = "config.json"
IGNORE = -100  # label of a token that is not a target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("export", type=Path, help="exported directory; its code is run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of the adapter")
    parser.add_argument(
        "--records", metavar="FILE", help="LLaVA records (.json or .jsonl); without: only merge"
    )
    parser.add_argument("--images", metavar="DIR", help="where image paths start")
    parser.add_argument("--merge", type=Path, metavar="DIR", help="write the merged model here")
    parser.add_argument("--force", action="store_true", help="replace an earlier merged model")
    parser.add_argument(
        "--targets",
        nargs="+",
        choices=(*MODULES, "experts"),
        default=["attention", "experts"],
        help="what is adapted (attention experts)",
    )
    parser.add_argument("--rank", type=int, default=16, help="of the adapters, per expert (16)")
    parser.add_argument("--alpha", type=float, default=32.0, help="scale is alpha / rank (32)")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=-1, help="instead of --epochs")
    parser.add_argument("--batch-size", type=int, default=1, help="samples of a forward pass (1)")
    parser.add_argument("--accumulate", type=int, default=16, help="forward passes of a step (16)")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a sample (2048)")
    parser.add_argument("--save-steps", type=int, default=0, help="between checkpoints; 0: none")
    parser.add_argument("--log-steps", type=int, default=10, help="between lines of the log (10)")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory, a third more work"
    )
    options = parser.parse_args()
    try:
        check_options(options)
        model = adapted(options) if options.records is None else train(options)
        if options.merge is not None:
            merge(model, options)
    except ImportError as error:
        sys.exit(f"lora.py: {error}: run {sys.executable} -m pip install peft accelerate.")


def check_options(options: argparse.Namespace) -> None:
    """Refuse what cannot be done, before a model is loaded.

    Raises:
        UserError: See the sentences.
    """
    if not (options.export / "processor_config.json").is_file():
        raise UserError(f"{options.export} is no exported model: name the directory of an export.")
    for name in ("rank", "batch_size", "accumulate", "max_length", "log_steps"):
        if getattr(options, name) < 1:
            word = name.replace("_", "-")
            raise UserError(f"--{word} is {getattr(options, name)}: use 1 or more.")
    if (options.records is None) != (options.images is None):
        raise UserError("--records and --images belong together: give both, or only --merge.")
    if options.merge is not None:
        check_output(options.merge, force=options.force, marker=MARKER)
    elif options.records is None:
        raise UserError("There is nothing to do: give --records and --images, or --merge.")
    if options.records is None and not (options.out / "adapter_config.json").is_file():
        raise UserError(f"--out is {options.out}, which holds no adapter: train one first.")


def train(options: argparse.Namespace) -> Any:
    """Train the adapter with transformers' Trainer and save it.

    Returns:
        The model with its adapter.

    Raises:
        UserError: The records or images cannot be used.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    dataset = Samples(options)
    arguments = TrainingArguments(
        output_dir=str(options.out),
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate,
        num_train_epochs=options.epochs,
        max_steps=options.steps,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # of all
        max_grad_norm=1.0,
        logging_steps=options.log_steps,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=max(options.save_steps, 1),
        save_total_limit=2,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to="none",
        seed=options.seed,
        **({"gradient_checkpointing": True} if options.gradient_checkpointing else {}),
    )
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules=module_pattern(options.targets),
        target_parameters=list(EXPERTS) if "experts" in options.targets else None,
    )
    set_seed(options.seed)  # of the adapter's first values
    base = load(options.export)
    base.config.use_cache = False
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate)
    has_checkpoint = options.out.is_dir() and get_last_checkpoint(str(options.out)) is not None
    trainer.train(resume_from_checkpoint=has_checkpoint)
    trainer.save_model()
    return model.eval()


def adapted(options: argparse.Namespace) -> Any:
    """The model with the adapter that an earlier call has saved."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load(options.export), str(options.out)).eval()


def merge(model: Any, options: argparse.Namespace) -> None:
    """Add the adapter to the weights, and write a directory like the export.

    All files but the weights are the export's own: its code, processor, template and settings.

    Raises:
        UserError: The directory cannot be written.
    """
    merged = model.merge_and_unload(safe_merge=True)
    size = sum(tensor.nbytes for tensor in merged.state_dict().values())
    with new_directory(options.merge, num_bytes=size, force=options.force, marker=MARKER) as folder:
        merged.save_pretrained(folder)
        for file in options.export.iterdir():
            if file.is_file() and not WEIGHTS.fullmatch(file.name):
                shutil.copy(file, folder / file.name)
    print(f"{options.merge}: the merged model; it is used as {options.export} is")


def load(export: Path) -> Any:
    """The exported model in the dtype of its weights; the Trainer chooses its device."""
    import torch

    from moiie_megatron.exported.load import load_model

    return load_model(export, torch.device("cpu"))


def module_pattern(targets: Sequence[str]) -> str | list[str]:
    """What peft calls ``target_modules``: never those of the vision encoder."""
    parts = [MODULES[name] for name in targets if name in ("attention", "ffn")]
    places = [rf"language_model\.layers\.\d+\.({'|'.join(parts)})"] if parts else []
    if "connector" in targets:
        places.append(rf"multi_modal_projector\.{MODULES['connector']}")
    return rf".*\.({'|'.join(places)})" if places else []


class Samples:
    """The records as inputs of the exported model.

    A record whose picture cannot be read is replaced by the next one, and named once.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.data, self.statistics = open_samples(options)
        self.skipped: set[int] = set()
        self[0]  # a wrong image directory is told before the model is loaded

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """``input_ids``, ``labels`` and ``mm_token_type_ids`` ``(t,)``, pixels ``(i, 3, S, S)``.

        Raises:
            UserError: No record can be used.
        """
        from moiie_megatron.data.encode.images import normalize
        from moiie_megatron.data.records.record import BadRecord

        reason = ""
        for index in ((i + shift) % len(self.data) for shift in range(len(self.data))):
            try:
                example = self.data[index]
            except BadRecord as error:
                reason = str(error)
                if index not in self.skipped:
                    print(f"left out: {reason}", file=sys.stderr, flush=True)
                    self.skipped.add(index)
                continue
            encoded = example.encoded
            return {
                "input_ids": encoded.tokens,
                "labels": unshifted(encoded.labels),
                "mm_token_type_ids": encoded.token_types.long(),
                "pixel_values": normalize(example.images, *self.statistics),
            }
        raise UserError(f"No record can be used ({reason}): correct --records or --images.")


def unshifted(labels: Tensor) -> Tensor:
    """Labels as transformers takes them: of the token itself, not of the next one."""
    result = labels.roll(1)
    result[0] = IGNORE
    return result


def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch, its rows padded at the right; without pictures it has no ``pixel_values``."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    fillers = {"input_ids": 0, "labels": IGNORE, "mm_token_type_ids": 0}
    batch = {
        name: pad_sequence([s[name] for s in samples], batch_first=True, padding_value=filler)
        for name, filler in fillers.items()
    }
    lengths = torch.tensor([len(s["input_ids"]) for s in samples])
    batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    pixels = torch.cat([s["pixel_values"] for s in samples])
    return batch | ({"pixel_values": pixels} if len(pixels) else {})


def open_samples(options: argparse.Namespace) -> tuple[LlavaDataset, list[tuple[float, ...]]]:
    """The records, read as training reads them, with what the export says of template and images.

    Returns:
        The samples, and mean and standard deviation of the pixels per channel.

    Raises:
        UserError: The records, the image directory or the tokenizer cannot be used.
    """
    from moiie_megatron.data.encode.chat_jinja import name_in
    from moiie_megatron.data.encode.encoding import Encoding
    from moiie_megatron.data.encode.images import ImageLoader
    from moiie_megatron.data.encode.templates import load_template
    from moiie_megatron.data.encode.tokenizers import load_tokenizer
    from moiie_megatron.data.records.llava import RecordFile
    from moiie_megatron.data.stream.dataset import LlavaDataset, Source
    from moiie_megatron.exported.load import load_processor

    processor = load_processor(options.export)
    tokenizer = load_tokenizer(options.export, processor.image_token)
    name = name_in(processor.chat_template or "") or "tokenizer"
    encoding = Encoding(
        tokenizer,
        load_template(name, tokenizer, processor.image_token),
        processor.num_image_tokens,
        options.max_length,
    )
    statistics = [tuple(getattr(processor.image_processor, f"image_{k}")) for k in ("mean", "std")]
    images = ImageLoader(options.images, processor.image_size, processor.image_mode, statistics[0])
    return LlavaDataset([Source(RecordFile(options.records), images)], encoding), statistics


if __name__ == "__main__":
    run_program(main)
