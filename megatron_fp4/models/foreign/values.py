"""The keys of somebody else's `config.json`: each is read, known to change no logit, or refused by its name and value.

A key that nobody asked about is the way in which a model of another kind passes for one of these: `sliding_window`,
`embedding_multiplier`, `no_rope_layers` are such keys. So nothing is skipped that is not on the list below.

Not here: what the keys mean (read_config.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WITHOUT_EFFECT = frozenset(
    (
        *("_attn_implementation", "_attn_implementation_internal", "_commit_hash", "_name_or_path"),
        *("add_cross_attention", "attn_implementation", "bad_words_ids", "begin_suppress_tokens", "bos_token_id"),
        *("chunk_size_feed_forward", "cls_token_id", "cross_attention_hidden_size", "decoder_start_token_id"),
        *("diversity_penalty", "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id"),
        *("exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id"),
        *("id2label", "is_decoder", "is_encoder_decoder", "keys_to_ignore_at_inference", "label2id", "length_penalty"),
        *("max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences"),
        *("output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix", "pretraining_tp"),
        *("problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict"),
        *("return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature"),
        *("tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript"),
        *("transformers.js_config", "transformers_version", "typical_p", "unk_token_id", "unsloth_fixed"),
        *("unsloth_version", "use_bfloat16", "use_cache"),
    )
)
"""Keys of any model that say how text is generated, how it is stored or computed, or what its labels are called."""


class ForeignValues:
    """The keys of a config.json, from which the reader takes what it understands."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._rest = dict(values)
        self.source = source

    def take(self, key: str, default: Any = None) -> Any:
        """The value of `key`, `default` if there is none."""
        return self._rest.pop(key, default)

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number. Raises ValueError; where there is none and no default, too."""
        value = self.take(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise self.refused(key, value, "no positive whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Raises ValueError for what is no number; where there is none and no default, too."""
        value = self.take(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refused(key, value, "no number")
        return float(value)

    def strings(self, key: str) -> list[str] | None:
        """A list of words, None where there is none. Raises ValueError."""
        value = self.take(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
            raise self.refused(key, value, "no list of words")
        return value

    def require(self, key: str) -> None:
        """Raises ValueError where there is no `key`, and takes nothing."""
        if key not in self._rest:
            raise ValueError(f"{self.source}: {key} is missing, which transformers refuses too; it has no default")

    def expect_not(self, key: str, value: Any) -> None:
        """Raises ValueError for `value`, and takes nothing."""
        if key in self._rest and self._rest[key] == value:
            raise self.refused(key, value, "which this model does not compute")

    def expect(self, key: str, *allowed: Any, default: Any = None) -> None:
        """Raises ValueError for a value of `key` that is none of `allowed`. default: what a missing key means."""
        value = self.take(key, default)
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            known = " or ".join(repr(one) for one in allowed)
            raise self.refused(key, value, f"which this model does not compute; it computes {known}")

    def refused(self, key: str, value: Any, reason: str) -> ValueError:
        """The refusal of one key."""
        return ValueError(f"{self.source}: {key} = {value!r}, {reason}")

    def check_rest(self, *also_without_effect: str) -> None:
        """Raises ValueError with every key that was neither taken nor is known to have no effect."""
        unknown = self._rest.keys() - WITHOUT_EFFECT - set(also_without_effect)
        if unknown:
            listed = ", ".join(f"{key} = {self._rest[key]!r}" for key in sorted(unknown))
            raise ValueError(
                f"{self.source}: nothing is known of {listed}; a model that computes something with it would give other"
                " logits here. If it changes none, remove it from the file"
            )
