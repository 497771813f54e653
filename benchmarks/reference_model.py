"""The system that ``train_step.py`` compares with: plain PyTorch and transformers.

The style of MoIIE's published code: a Hugging Face Llama whose FFNs in MoE layers are replaced by
a Python loop over experts with boolean selection by modality, a Hugging Face vision encoder, and
torch's own optimizer and data parallelism.

Shapes: b batch, s sequence, h hidden, T = b * s tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.encode.images import normalize
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.families.hf_config import language_to_hf
from moiie_megatron.families.registry import vision_family
from moiie_megatron.layout.experts import ExpertLayout
from moiie_megatron.layout.token_types import IMAGE, PADDING
from moiie_megatron.vlm.vision import build_vision_model


class LoopOverExperts(torch.nn.Module):
    """A plain MoE block: boolean selection by modality, a Python loop over experts."""

    def __init__(
        self, hidden: int, ffn: int, layout: ExpertLayout, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.layout = layout

        def linear(rows: int, columns: int) -> torch.nn.Linear:
            return torch.nn.Linear(rows, columns, bias=False, dtype=dtype)

        self.up = torch.nn.ModuleList(linear(hidden, 2 * ffn) for _ in range(layout.num_experts))
        self.down = torch.nn.ModuleList(linear(ffn, hidden) for _ in range(layout.num_experts))
        self.gates = torch.nn.ModuleDict(
            {name: linear(hidden, len(layout.allowed(name))) for name in layout.routers}
        )
        self.masks: dict[str, Tensor] = {}  # by router (T,), before every forward
        self.balance_loss: Tensor | float = 0.0

    def forward(self, hidden: Tensor) -> Tensor:
        hidden_Th = hidden.reshape(-1, hidden.shape[-1])
        output_Th = torch.zeros_like(hidden_Th)
        self.balance_loss = 0.0
        for name, mask_T in self.masks.items():
            rows = mask_T.nonzero().squeeze(1)
            own = hidden_Th[rows]
            probs = torch.softmax(self.gates[name](own).float(), dim=-1)
            top, ids = probs.topk(self.layout.top_k, dim=-1)
            weights = (top / top.sum(dim=-1, keepdim=True)).to(hidden.dtype)
            share = F.one_hot(ids, probs.shape[1]).sum(dim=1).float().mean(dim=0)
            self.balance_loss += probs.shape[1] * torch.dot(share, probs.mean(dim=0))
            part = torch.zeros_like(own)
            for column, expert in enumerate(self.layout.allowed(name)):
                token, slot = torch.where(ids == column)
                gate, up = self.up[expert](own[token]).chunk(2, dim=-1)
                out = self.down[expert](F.silu(gate) * up) * weights[token, slot, None]
                part.index_add_(0, token, out)
            output_Th.index_add_(0, rows, part)
        return output_Th.view_as(hidden)


class ReferenceModel(torch.nn.Module):
    """Vision encoder, connector and Llama with experts, of the sizes of a run."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        language, vision = config.language, config.vision
        self.config = config
        self.vision = build_vision_model(vision)
        self.connector = torch.nn.Sequential(
            torch.nn.Linear(vision.hidden_size, language.hidden_size),
            torch.nn.GELU(),
            torch.nn.Linear(language.hidden_size, language.hidden_size),
        )
        self.language = LlamaForCausalLM(language_to_hf(language))
        self.blocks = []
        for layer in config.moe_layers:
            block = LoopOverExperts(
                language.hidden_size, language.ffn_hidden_size, config.moe.layout
            )
            self.language.model.layers[layer].mlp = block
            self.blocks.append(block)
        # Parameters behind the features get no gradient, which DDP would wait for.
        last = vision.num_layers + 1 + vision.feature_layer
        for module in (*self.vision.encoder.layers[last:], self.vision.post_layernorm):
            module.requires_grad_(False)

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a micro-batch: summed over its label tokens, and the balance losses."""
        statistics = vision_family(self.config.vision.family).statistics
        types = batch.token_types
        text = torch.where(types == IMAGE, 0, batch.tokens)
        embeddings = self.language.get_input_embeddings()(text)
        if len(batch.images):
            images = normalize(batch.images, statistics.mean, statistics.std)
            features = self.vision(images, output_hidden_states=True).hidden_states[-2]
            embeddings = embeddings.masked_scatter(
                (types == IMAGE).unsqueeze(-1), self.connector(features)
            )
        is_image_T, is_real_T = (types == IMAGE).flatten(), (types != PADDING).flatten()
        for block in self.blocks:
            block.masks = {"vision": is_image_T, "text": ~is_image_T & is_real_T}
        logits = self.language(
            inputs_embeds=embeddings,
            attention_mask=(types != PADDING).long(),
            position_ids=batch.position_ids,
            use_cache=False,
        ).logits
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), batch.labels.flatten(), reduction="sum"
        )
        balance = sum(block.balance_loss for block in self.blocks) / len(self.blocks)
        return loss / max(batch.num_label_tokens, 1) + 0.001 * balance
