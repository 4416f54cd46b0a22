"""An exported model for `transformers`: importing this module makes its Auto classes read one.

    import models.hf
    model = transformers.AutoModelForCausalLM.from_pretrained("<exported folder>")

B batch, T time, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        GenerationMixin,
        PretrainedConfig,
        PreTrainedModel,
    )
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise ImportError(
        'models.hf needs the package transformers: pip install "seqmix[eval]"'
    ) from error

from kernels.linear_cross_entropy import linear_cross_entropy
from layers.state import repeat_batch, select_batch
from models.exported import MODEL_TYPE, build_exported


class SeqmixConfig(PretrainedConfig):
    """config.json of an exported folder.

    Args:
        network: the nodes that the network is built from, see models.exported.network_of.
    """

    model_type = MODEL_TYPE

    def __init__(self, vocab_size: int = 1, network: dict | None = None, **more: Any) -> None:
        self.vocab_size = vocab_size
        self.network = network or {}
        size = self.network.get("model", {})
        self.hidden_size = size.get("d_model", 1)
        self.num_hidden_layers = size.get("num_layers", 1)
        # Tied matrices are one tensor of ours, and not for transformers to tie.
        super().__init__(**{**more, "tie_word_embeddings": False})


class StateCache:
    """The states of all mixers in the place of a key-value cache."""

    is_compileable = False
    is_croppable = False

    def __init__(self, state: Any, seen: int = 0) -> None:
        self.state, self.seen = state, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that were read, padding included."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self.state = select_batch(self.state, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self.state = repeat_batch(self.state, repeats)


class SeqmixForCausalLM(PreTrainedModel, GenerationMixin):
    """A TokenModel under the interface of `transformers`; `generate` decodes from our states."""

    config_class = SeqmixConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True  # a state cannot be cut back, which assisted decoding would want
    _keys_to_ignore_on_load_missing = None

    def __init__(self, config: SeqmixConfig) -> None:
        super().__init__(config)
        self.model = build_exported(config.network, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the network has initialised itself."""

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Linear | None:
        """The head, None where it is the embedding."""
        return self.model.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), and the states after `input_ids` (B, T) when `use_cache`.

        Args:
            attention_mask: (B, past + T), 0 at padding; its last T columns are read.
            labels: (B, T), shifted here, -100 ignored: the loss is their mean cross entropy.
            logits_to_keep: logits of the last positions only; 0 is all.
        """
        segments = self._segments(input_ids, attention_mask)
        past = past_key_values
        use_cache = past is not None if use_cache is None else use_cache
        h, state = self.model.hidden(
            input_ids,
            None if past is None else past.state,
            segments=segments,
            want_state=use_cache,
        )
        loss = None
        if labels is not None:
            loss = linear_cross_entropy(h[:, :-1], self.model.head_weight, labels[:, 1:])
        logits = nn.functional.linear(h[:, -logits_to_keep:], self.model.head_weight)
        seen = input_ids.shape[1] + (0 if past is None else past.seen)
        if use_cache and past is not None:
            past.state, past.seen = state, seen
        elif use_cache:
            past = StateCache(state, seen)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past if use_cache else None,  # type: ignore[arg-type]
        )

    def _segments(self, input_ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """Document numbers from a mask; None where nothing is padding.

        Raises:
            ValueError: padding, and a mixer that does not keep it apart.
        """
        if mask is None:
            return None
        mask = mask[:, -input_ids.shape[1] :]
        if bool(mask.all()):
            return None
        if not self.model.supports_segments:
            raise ValueError(
                "attention_mask: this model has a mixer that cannot leave out padding; "
                "give sequences of one length"
            )
        return torch.where(mask.bool(), 0, -1)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """The empty past, with room for the whole continuation."""
        if model_kwargs.get("past_key_values") is not None or not generation_config.use_cache:
            return
        rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        state = self.model.new_state(rows, max_cache_length + 1, self.device)
        model_kwargs["past_key_values"] = StateCache(state)


AutoConfig.register(MODEL_TYPE, SeqmixConfig)
AutoModelForCausalLM.register(SeqmixConfig, SeqmixForCausalLM)
