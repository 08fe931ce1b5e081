"""Models and tokenizers: load, make, adapt, save.

A model is an artifact of ours or what the user gave as `model.base`: an HF directory, a hub id or a
GGUF file. Weights are fp32 and come from safetensors (or GGUF) only; no code of a model is ever run.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as hf_logging

from pipeline import sources
from pipeline.errors import ArtifactError, ConfigError
from pipeline.job import Input
from pipeline.records import canonical_json
from pipeline.settings import LoraSettings
from pipeline.settings.model import ModelSettings
from stages.chat import (
    CHAT_TEMPLATE,
    decode_response,
    encode_completion,
    encode_conversation,
    encode_prompt,
)
from stages.repairs import (
    fit_to_tokenizer,
    repair_tokenizer,
    repairs_of,
    set_special_ids,
    switch_dropout_off,
    without_quantization,
)
from stages.sharding import state_of

__all__ = [
    "CHAT_TEMPLATE",
    "decode_response",
    "encode_completion",
    "encode_conversation",
    "encode_prompt",
    "repairs_of",
]

# what transformers raises for a folder or id that it cannot read
_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError)

# ---- load ----------------------------------------------------------------------------------


def load_tokenizer(item: Input) -> PreTrainedTokenizerBase:
    """The tokenizer of an artifact or, mended (see `repairs_of`), of a user's model.

    The same object is handed out again for a user's model: reading a GGUF file takes seconds.
    """
    if item.path is not None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(item.path, trust_remote_code=False)
        except _LOAD_ERRORS as error:
            raise ArtifactError(
                f"{item.path}: no readable tokenizer: {_first_line(error)}"
            ) from None
        return tokenizer
    return _user_tokenizer(_user_source(item))


def load_causal_lm(item: Input) -> PreTrainedModel:
    """A decoder with fp32 weights and no dropout, its embeddings fitted to `load_tokenizer(item)`."""
    hf_logging.disable_progress_bar()
    if item.path is not None:
        return _from_pretrained(AutoModelForCausalLM, str(item.path), {}, ArtifactError)
    source = _user_source(item)
    where, extra = _locate(source)
    model = _from_pretrained(AutoModelForCausalLM, where, extra, ConfigError)
    if "gguf_file" in extra:
        model = without_quantization(model)
    fit_to_tokenizer(model, _user_tokenizer(source))
    return model.eval()


def load_config(item: Input, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration of `load_causal_lm(item)`, without its weights."""
    where, extra = _locate(_user_source(item))
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=False, **extra)
    except _LOAD_ERRORS as error:
        raise ConfigError(f"{where}: no readable configuration: {_first_line(error)}") from None
    switch_dropout_off(config)
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    return config


def load_reward_model(item: Input) -> PreTrainedModel:
    """A sequence classifier with one label, as `new_reward_model` makes it and `save_model` saves it."""
    hf_logging.disable_progress_bar()
    assert item.path is not None
    return _from_pretrained(
        AutoModelForSequenceClassification, str(item.path), {}, ArtifactError, num_labels=1
    )


def new_reward_model(item: Input, dropout: float = 0.0, seed: int | None = None) -> PreTrainedModel:
    """The model of `item` with a fresh scalar head instead of its vocabulary head.

    dropout: on the hidden state below the head, in training only.
    seed: of the head; None draws from torch's global generator.
    """
    hf_logging.disable_progress_bar()
    source = load_causal_lm(item)
    config = type(source.config).from_dict(source.config.to_dict())
    config.num_labels = 1
    try:
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise ConfigError(
            f"{config.model_type} has no sequence classifier to make a reward model of:"
            f" {_first_line(error)}"
        ) from None
    backbone, head = backbone_and_head(model)
    backbone.load_state_dict(source.base_model.state_dict())
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    weight = head.weight
    with torch.no_grad():
        # 1 / sqrt(d + 1): Stiennon et al. 2020, appendix B.1
        weight.copy_(torch.randn(weight.shape, generator=generator) / (weight.shape[1] + 1) ** 0.5)
        if head.bias is not None:
            head.bias.zero_()
    set_special_ids(model, load_tokenizer(item))
    if dropout > 0:
        # a hook, not a layer: the folder stays a plain AutoModelForSequenceClassification
        def drop(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (nn.functional.dropout(args[0], dropout, training=layer.training),)

        head.register_forward_pre_hook(drop)
    return model.eval()


def backbone_and_head(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """The base transformer and the scalar head of a sequence classifier, adapters or not."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear):
            assert isinstance(model, PreTrainedModel)
            return model.base_model, head
    raise ConfigError(f"{type(model).__name__} has no linear scoring head")


def _user_source(item: Input) -> str:
    if len(item.sources) != 1:
        raise ConfigError(f"{item.role}: exactly one model is needed, got {list(item.sources)}")
    return item.sources[0]


def _locate(source: str) -> tuple[str, dict[str, str]]:
    """Where transformers finds the model, and its extra arguments."""
    if sources.kind(source) == "hub":
        return source, {}
    path = Path(source).expanduser()
    if not path.exists():
        raise ConfigError(f"model.base: {source} does not exist")
    if path.is_dir():
        return str(path), {}
    if path.suffix.lower() != ".gguf":
        raise ConfigError(f"model.base: {source} is neither a model folder nor a GGUF file")
    return str(path.parent), {"gguf_file": path.name}


@lru_cache(maxsize=4)
def _user_tokenizer(source: str) -> PreTrainedTokenizerBase:
    where, extra = _locate(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **extra)
    except _LOAD_ERRORS as error:
        raise ConfigError(f"{source}: no readable tokenizer: {_first_line(error)}") from None
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ConfigError(f"{source}: a fast tokenizer with an end token is needed")
    gguf = Path(where) / extra["gguf_file"] if extra else None
    repair_tokenizer(tokenizer, gguf)
    return tokenizer


def _from_pretrained(
    auto: Any,
    where: str,
    extra: dict[str, str],
    error_type: type[ArtifactError] | type[ConfigError],
    **config_keys: Any,
) -> PreTrainedModel:
    try:
        _refuse_pickles(Path(where))
        config = AutoConfig.from_pretrained(where, trust_remote_code=False, **extra, **config_keys)
        switch_dropout_off(config)
        model, info = auto.from_pretrained(
            where,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **extra,
        )
    except _LOAD_ERRORS as error:
        raise error_type(f"{where}: cannot be loaded as a model: {_first_line(error)}") from None
    # transformers fills missing weights with random numbers and goes on
    missing = sorted(info["missing_keys"]) + sorted(str(m) for m in info["mismatched_keys"])
    if missing:
        raise error_type(f"{where}: weights are missing: {', '.join(missing[:3])} ({len(missing)})")
    return model.eval()


def _refuse_pickles(folder: Path) -> None:
    """`use_safetensors` says nothing of an adapter, nor of what an index leads to.

    Raises:
        ValueError: one of them is no safetensors file.
    """
    adapter = folder / "adapter_model.safetensors"
    if (folder / "adapter_config.json").is_file() and not adapter.is_file():
        raise ValueError("its adapter is no safetensors file")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        others = sorted(name for name in shards if not str(name).endswith(".safetensors"))
        if others:
            raise ValueError(f"{others[0]} is no safetensors file")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


# ---- make ----------------------------------------------------------------------------------


def new_causal_lm(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A decoder with random weights (torch's global generator), its vocabulary the tokenizer's."""
    return _new(AutoModelForCausalLM, settings, tokenizer, "decoder")


def new_masked_lm(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A masked-word encoder with random weights (torch's global generator)."""
    return _new(AutoModelForMaskedLM, settings, tokenizer, "masked-word encoder")


def _new(
    auto: Any, settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, what: str
) -> PreTrainedModel:
    config = new_config(settings, tokenizer)
    try:
        model = auto.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            # some shapes that do not fit together are only found when the model is used
            model(torch.zeros((1, 2), dtype=torch.long))
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"model.architecture {settings.architecture}: no {what} can be made with these settings:"
            f" {_first_line(error)}"
        ) from None
    set_special_ids(model, tokenizer)
    return model


def new_config(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The transformers configuration of a new model.

    Raises:
        ConfigError: unknown architecture, or keys of model.extra that it does not know.
    """
    try:
        default = AutoConfig.for_model(settings.architecture)
    except ValueError:
        raise ConfigError(
            f"model.architecture: transformers knows no {settings.architecture!r}",
            "Examples: llama, gpt2, qwen3, mistral, gpt_neox; bert for a masked-word encoder.",
        ) from None

    def known(key: str) -> bool:
        return key in type(default).attribute_map or hasattr(default, key)

    width = settings.intermediate_size or -(-settings.hidden_size * 8 // 3 // 32) * 32
    keys: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.num_hidden_layers,
        "num_attention_heads": settings.num_attention_heads,
        "max_position_embeddings": settings.max_length,
        "tie_word_embeddings": settings.tie_word_embeddings,
        "initializer_range": settings.initializer_range or settings.hidden_size**-0.5,
        **{f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")},
    }
    unknown = [key for key in settings.extra if not known(key) or key.startswith("_")]
    doubled = [key for key in settings.extra if key in keys or key == "intermediate_size"]
    if unknown or doubled:
        raise ConfigError(
            f"model.extra: {settings.architecture} has no key {', '.join(unknown)}"
            if unknown
            else f"model.extra: {', '.join(doubled)} has a setting of its own"
        )
    # defaults of these belong to the size of the published model, not to this one
    optional = {
        "intermediate_size" if known("intermediate_size") else "n_inner": width,
        "ffn_dim": width,
        "num_key_value_heads": settings.num_attention_heads,
        "head_dim": settings.hidden_size // settings.num_attention_heads,
        "word_embed_proj_dim": settings.hidden_size,
    }
    keys |= {key: value for key, value in optional.items() if known(key)}
    config = AutoConfig.for_model(settings.architecture, **{**keys, **settings.extra})
    switch_dropout_off(config)
    return config


def positions(model: PreTrainedModel) -> int | None:
    """The longest sequence, in tokens, that a model can read; None where it states no limit."""
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    return limit


# ---- adapt ---------------------------------------------------------------------------------


def add_lora(model: PreTrainedModel, lora: LoraSettings, task: str) -> PreTrainedModel | PeftModel:
    """Adapters on every linear layer but the heads; with rank 0 the model as it is.

    task: "causal" or "reward"; the scalar head of a reward model is trained whole.
    Adapters start random: seed torch's global generator before.
    """
    if lora.rank == 0:
        return model
    names: set[str] = set()
    conv1d = False
    for name, layer in model.base_model.named_modules():
        if isinstance(layer, nn.Linear | Conv1D):
            names.add(name.rpartition(".")[2])
            conv1d = conv1d or isinstance(layer, Conv1D)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(names),
        exclude_modules=["lm_head", "score", "classifier"],
        fan_in_fan_out=conv1d,
        bias="none",
    )
    adapted = get_peft_model(model, config)
    if task == "reward":
        backbone_and_head(adapted)[1].requires_grad_(True)
    return adapted


def add_adapter(model: PeftModel, name: str, like: str = "default") -> None:
    """A second adapter of the same shape, trainable, that changes nothing yet; `like` stays active.

    Its down-projections start random: seed torch's global generator before.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.add_adapter(name, model.peft_config[like])
    marked = re.compile(rf"\.lora_\w+\.{name}\.")
    for parameter_name, parameter in model.named_parameters():
        if marked.search(parameter_name):
            parameter.requires_grad_(True)
    # peft leaves one adapter trainable at a time
    for parameter in trainable:
        parameter.requires_grad_(True)


def merge_lora(model: nn.Module) -> PreTrainedModel:
    """The plain model with the adapters added into its weights."""
    merged = model.merge_and_unload() if isinstance(model, PeftModel) else model
    assert isinstance(merged, PreTrainedModel)
    return merged.requires_grad_(True)


# ---- save ----------------------------------------------------------------------------------


def save_model(
    model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """An HF folder whose bytes depend on the content only: no path, date or library version.

    A sharded model is saved inside `sharding.whole`.
    """
    _refuse_pad_eos(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    if model is not None:
        model.config._name_or_path = ""
        model.save_pretrained(folder, state_dict=state_of(model))
        for name in ("config.json", "generation_config.json"):
            _strip(folder / name, "transformers_version", "_name_or_path", "_model_name_or_path")
    tokenizer.save_pretrained(folder)
    _strip(folder / "tokenizer_config.json", "name_or_path", "is_local", "local_files_only")


def _strip(path: Path, *keys: str) -> None:
    if path.exists():
        values = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in values.items() if key not in keys}
        text = json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")


def contract_of(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None
) -> dict[str, Any]:
    """What two artifacts must agree on, for the manifest.

    Raises:
        ArtifactError: pad is the end token.
    """
    _refuse_pad_eos(tokenizer)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # a call with padding or truncation leaves these behind
    parts = {key: value for key, value in backend.items() if key not in ("truncation", "padding")}
    return {
        "tokenizer": _digest(canonical_json(parts)),
        "chat_template": _digest(str(tokenizer.chat_template)),
        "vocab_size": len(tokenizer),
        "bos_id": tokenizer.bos_token_id,
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
        "max_length": positions(model) if model else None,
        "padding_side": tokenizer.padding_side,
    }


def _digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _refuse_pad_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ArtifactError(
            f"the tokenizer pads with its end token ({tokenizer.pad_token!r})",
            "A mask of `ids != pad` would delete every end of a response; give it another pad token.",
        )
