"""Rows of pretraining text that PPO mixes into its steps (InstructGPT, arXiv 2203.02155, eq. 2)."""

from __future__ import annotations

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from pipeline.errors import ConfigError, DataError
from pipeline.job import Input, Out
from pipeline.settings import Settings
from stages.common import epoch_order, exact_div, later_round
from stages.packing import PackedRows, pack_sources
from stages.rollout import Sequences, make_sequences, tokens_at_once


class PtxRows:
    """Packed text, and this rank's rows of it for each optimiser step.

    positions: tokens that the policy can read. tokens_per_step: predicted tokens of one step over all
    ranks.
    """

    def __init__(
        self,
        item: Input,
        settings: Settings,
        positions: int | None,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
        out: Out,
    ) -> None:
        ppo = settings.ppo
        if positions is not None and ppo.ptx_tokens > positions:
            raise ConfigError(
                f"ppo.ptx_tokens {ppo.ptx_tokens} is more than the {positions} tokens that the"
                " policy can read"
            )
        folder = out.checkpoints / "ptx"
        if out.rank == 0:
            # pretraining's held-out part stays held out: the perplexity is measured on it
            out.derived["ptx_documents_dropped"] = pack_sources(
                item, settings.pretrain, tokenizer, folder, "ppo.ptx_data", out
            )
        accelerator.wait_for_everyone()
        self.packed = PackedRows(folder, "train", ppo.ptx_tokens)
        if len(self.packed) == 0:
            raise DataError(
                f"ppo.ptx_data: the text has fewer tokens than one row of {ppo.ptx_tokens}",
                "Give more text or a smaller ppo.ptx_tokens.",
            )
        exact_div(ppo.ptx_rows, accelerator.num_processes, "ppo.ptx_rows")
        self.rows = ppo.ptx_rows
        self.seed, self.round = settings.run.seed, out.round
        self.pad_id = tokenizer.pad_token_id
        self.accelerator = accelerator
        self.tokens_per_step = ppo.ptx_rows * (ppo.ptx_tokens - 1)

    def rollouts_at_once(self, rollouts: int, vocab_size: int) -> int:
        """Rollouts of a micro-batch so that its share of the text is no larger than one itself."""
        device, ranks = self.accelerator.device, self.accelerator.num_processes
        tokens = self.rows // ranks * self.packed.length
        parts = -(-tokens // tokens_at_once(device, vocab_size))
        return max(1, rollouts // parts)

    def split(self, step: int, parts: int) -> list[Sequences | None]:
        """This rank's rows of a step, shared out over its micro-batches; None where none is left."""
        purpose = ("ppo", "ptx", *later_round(self.round))
        order = epoch_order(len(self.packed), step * self.rows, self.rows, self.seed, *purpose)
        own = order[self.accelerator.process_index :: self.accelerator.num_processes]
        return [self._sequences(own[number::parts]) for number in range(parts)]

    def _sequences(self, picked: list[int]) -> Sequences | None:
        if not picked:
            return None
        rows = self.packed.rows(picked).tolist()
        # the first token has nothing before it to be predicted from
        return make_sequences(
            [row[:1] for row in rows],
            [row[1:] for row in rows],
            self.pad_id,
            self.accelerator.device,
        )
