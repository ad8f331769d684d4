"""Weights of csm-1b's two published layouts to ours and back: python weight_layouts.py IN OUT --to transformers

Sesame's layout has torchtune's names and interleaved rotary rows (channel 2i pairs with 2i + 1); transformers' has its
own names and rotate-half rows, as ours, and may hold the tied audio table once or twice. Every conversion is exact.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from architecture import ADDED, CSM, load_model, save_model
from checkpointing import load_into, save_tensors
from command_line import EXIT_CODES_HELP, EXIT_DONE, MissingRequirement, run
from model_sizes import CSMConfig, preset
from transformer import TransformerConfig

LAYOUTS = ("ours", "sesame", "transformers")
TIED_AUDIO = ("backbone_model.embed_tokens.embed_audio_tokens.weight", "depth_decoder.model.embed_tokens.weight")


def sesame_names(config: CSMConfig) -> dict[str, str]:
    """Sesame's tensor name -> ours."""
    names = {
        "text_embeddings.weight": "text_embedding.weight",
        "audio_embeddings.weight": "audio_embedding.weight",
        "projection.weight": "projection.weight",
        "codebook0_head.weight": "codebook0_head.weight",
        "audio_head": "depth_heads",
    }
    parts = {
        "attn.q_proj.weight": "attention.q_proj.weight",
        "attn.k_proj.weight": "attention.k_proj.weight",
        "attn.v_proj.weight": "attention.v_proj.weight",
        "attn.output_proj.weight": "attention.o_proj.weight",
        "mlp.w1.weight": "feed_forward.gate_proj.weight",
        "mlp.w2.weight": "feed_forward.down_proj.weight",
        "mlp.w3.weight": "feed_forward.up_proj.weight",
        "sa_norm.scale": "attention_norm.weight",
        "mlp_norm.scale": "feed_forward_norm.weight",
    }
    for theirs, ours, stack in (("backbone", "backbone", config.backbone), ("decoder", "depth", config.depth)):
        names[f"{theirs}.norm.scale"] = f"{ours}.norm.weight"
        for i in range(stack.n_layers):
            names |= {f"{theirs}.layers.{i}.{a}": f"{ours}.blocks.{i}.{b}" for a, b in parts.items()}
    return names


def transformers_names(config: CSMConfig) -> dict[str, str]:
    """transformers' tensor name -> ours; both names of the tied audio table are listed."""
    names = {
        "embed_text_tokens.weight": "text_embedding.weight",
        **dict.fromkeys(TIED_AUDIO, "audio_embedding.weight"),
        "lm_head.weight": "codebook0_head.weight",
        "depth_decoder.codebooks_head.weight": "depth_heads",
        "depth_decoder.model.inputs_embeds_projector.weight": "projection.weight",
    }
    parts = {f"self_attn.{p}_proj.weight": f"attention.{p}_proj.weight" for p in "qkvo"}
    parts |= {f"mlp.{p}_proj.weight": f"feed_forward.{p}_proj.weight" for p in ("gate", "up", "down")}
    parts |= {
        "input_layernorm.weight": "attention_norm.weight",
        "post_attention_layernorm.weight": "feed_forward_norm.weight",
    }
    stacks = (("backbone_model", "backbone", config.backbone), ("depth_decoder.model", "depth", config.depth))
    for theirs, ours, stack in stacks:
        names[f"{theirs}.norm.weight"] = f"{ours}.norm.weight"
        for i in range(stack.n_layers):
            names |= {f"{theirs}.layers.{i}.{a}": f"{ours}.blocks.{i}.{b}" for a, b in parts.items()}
    return names


def half_rows(weight: Tensor, d_head: int) -> Tensor:
    """(H d, D) rows in interleaved order -> rotate-half order, head by head."""
    return weight.view(-1, d_head // 2, 2, weight.size(1)).transpose(1, 2).reshape_as(weight)


def interleaved_rows(weight: Tensor, d_head: int) -> Tensor:
    """Inverse of `half_rows`."""
    return weight.view(-1, 2, d_head // 2, weight.size(1)).transpose(1, 2).reshape_as(weight)


def rotary_head_width(name: str, config: CSMConfig) -> int | None:
    """d of the head if our tensor `name` is a query or key projection, else None."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return None
    stack: TransformerConfig = getattr(config, name.split(".")[0])
    return stack.d_head


def from_sesame(tensors: dict[str, Tensor], config: CSMConfig) -> dict[str, Tensor]:
    """Sesame's tensors -> ours. Names that are not known are kept, so that loading refuses them by name."""
    names, converted = sesame_names(config), {}
    for theirs, tensor in tensors.items():
        ours = names.get(theirs, theirs)
        d_head = rotary_head_width(ours, config)
        converted[ours] = half_rows(tensor, d_head) if d_head else tensor
    return converted


def to_sesame(tensors: dict[str, Tensor], config: CSMConfig) -> dict[str, Tensor]:
    """Our tensors -> Sesame's."""
    converted = {}
    for theirs, ours in sesame_names(config).items():
        d_head = rotary_head_width(ours, config)
        converted[theirs] = interleaved_rows(tensors[ours], d_head) if d_head else tensors[ours]
    return converted


def from_transformers(tensors: dict[str, Tensor], config: CSMConfig) -> dict[str, Tensor]:
    """transformers' tensors -> ours. The codec's are left out; ValueError if two copies of the audio table differ."""
    copies = [tensors[name] for name in TIED_AUDIO if name in tensors]
    if len(copies) == 2 and not torch.equal(*copies):
        raise ValueError(f"the tied tensors {TIED_AUDIO[0]} and {TIED_AUDIO[1]} differ")
    names = transformers_names(config)
    return {names.get(name, name): tensor for name, tensor in tensors.items() if not name.startswith("codec_model.")}


def to_transformers(tensors: dict[str, Tensor], config: CSMConfig) -> dict[str, Tensor]:
    """Our tensors -> transformers', the tied audio table under the depth decoder's name only, as published."""
    return {theirs: tensors[ours] for theirs, ours in transformers_names(config).items() if theirs != TIED_AUDIO[0]}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, a sharded folder of them, or a checkpoint file of tensors alone."""
    if path.is_dir():
        files = [*sorted(path.glob("transformers-*.safetensors")), path / "model.safetensors", path / "ckpt.pt"]
        found = [file for file in files if file.is_file()]
        if not found:
            raise FileNotFoundError(f"no weights in {path}: expected transformers-*.safetensors or model.safetensors")
        shards = [file for file in found if file.name.startswith("transformers-")] or found[:1]
        return {name: tensor for file in shards for name, tensor in read_tensors(file).items()}
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    except Exception as error:  # torch.load raises many types for a file that is not its own
        raise ValueError(f"{path} is damaged or not a file of tensors ({type(error).__name__})") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} holds a {type(tensors).__name__}, expected a dict of tensors by name")
    return tensors


def load_published(path: Path, config: CSMConfig | None = None) -> CSM:
    """csm-1b (or another `config`) from a file or folder of either published layout, in eval mode.

    What the config adds to the published model starts as an exact no-op, drawn from torch's global generator.
    ValueError names the first tensor that is missing, unknown or misshapen.
    """
    config = config or preset("csm-1b")
    tensors = read_tensors(path)
    convert = from_sesame if "audio_embeddings.weight" in tensors else from_transformers
    with torch.device("meta"):
        model = CSM(config)
    model.to_empty(device="cpu")
    model.make_additions()
    model.reset_buffers()
    added = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(ADDED)}
    load_into(model, added | convert(tensors, config), str(path))
    return model.eval()


def save_published(model: CSM, folder: Path, layout: str) -> None:
    """Write `model.safetensors` of one layout into a folder; 'ours' has its config beside it.

    ValueError for a model with additions that a published layout has no place for.
    """
    if layout == "ours":
        save_model(model, folder)
        return
    for name in ("cross_attention_every", "semantic_heads", "prosodic_heads", "acoustic_delay"):
        if getattr(model.config, name):
            raise ValueError(f"{name}={getattr(model.config, name)}: the layout {layout} cannot hold it; write ours")
    if not model.config.zero_end_of_turn:
        raise ValueError(f"zero_end_of_turn=False: the layout {layout} ends turns with an all-zero frame; write ours")
    convert = to_sesame if layout == "sesame" else to_transformers
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "model.safetensors", convert(model.state_dict(), model.config))


def transformers_version() -> str:
    """Of transformers, loaded with its CSM. MissingRequirement without them."""
    try:
        import transformers
        from transformers import CsmForConditionalGeneration  # noqa: F401 - loads the model's file
    except ImportError as error:
        needed = "pip install -r requirements-dev.txt"
        raise MissingRequirement(f"the comparison needs transformers with CSM ({error}): {needed}") from error
    return transformers.__version__


def transformers_model(model: CSM) -> nn.Module:
    """transformers' CSM of the same sizes and weights as a model of the published architecture; without its codec."""
    from transformers import CsmConfig, CsmDepthDecoderConfig, CsmForConditionalGeneration, MimiConfig

    c = model.config
    ids = ("pad_token_id", "codebook_pad_token_id", "bos_token_id", "audio_token_id", "audio_eos_token_id")
    shared = {"num_codebooks": c.n_codebooks, "vocab_size": c.audio_vocab_size}
    depth = CsmDepthDecoderConfig(
        backbone_hidden_size=c.backbone.d_model,
        max_position_embeddings=c.n_codebooks + 1,
        **shared,
        **their_dimensions(c.depth, 16),
    )
    small = dict.fromkeys(("num_filters", "hidden_size", "intermediate_size", "codebook_dim", "codebook_size"), 8)
    heads = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    config = CsmConfig(
        text_vocab_size=c.text_vocab_size,
        max_position_embeddings=c.max_positions,
        depth_decoder_config=depth,
        codec_config=MimiConfig(**small, **heads, vector_quantization_hidden_dimension=8, upsample_groups=8),
        **dict.fromkeys(ids, 0),
        **shared,
        **their_dimensions(c.backbone, 1024),
    )
    twin = CsmForConditionalGeneration(config)
    twin.load_state_dict(to_transformers(model.state_dict(), c), strict=False)
    del twin.codec_model  # only encodes audio; the codes are given
    return twin.eval()


def their_dimensions(stack: TransformerConfig, context: int) -> dict:
    """Fields of a stack's config. `context` is what published configs call the original one, and count waves in."""
    rope = {"rope_type": "default", "rope_theta": stack.rope_base}
    if stack.rope_scale > 1:
        waves = {"low_freq_factor": context / 8192, "high_freq_factor": 4 * context / 8192}
        rope |= {
            "rope_type": "llama3",
            "factor": stack.rope_scale,
            "original_max_position_embeddings": context,
            **waves,
        }
    return {
        "hidden_size": stack.d_model,
        "intermediate_size": stack.d_ff,
        "num_hidden_layers": stack.n_layers,
        "num_attention_heads": stack.n_heads,
        "num_key_value_heads": stack.n_kv_heads,
        "head_dim": stack.d_head,
        "rms_norm_eps": stack.norm_eps,
        "rope_parameters": rope,
    }


def is_ours(path: Path) -> bool:
    """Whether a folder was written by `architecture.save_model`."""
    config = path / "config.json"
    try:
        return config.is_file() and "kind" in json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=EXIT_CODES_HELP)
    parser.add_argument("input", type=Path, help="weights: a folder or file of csm-1b in either layout, or our folder")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--to", choices=LAYOUTS, default="ours", help="layout to write (default: ours)")
    args = parser.parse_args(argv)
    model = load_model(args.input) if is_ours(args.input) else load_published(args.input)
    save_published(model, args.output, args.to)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters to {args.output} in the layout {args.to}")
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(run(main))
