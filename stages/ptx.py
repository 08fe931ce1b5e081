"""Rows of pretraining text that PPO mixes into its steps (InstructGPT, arXiv 2203.02155, eq. 2)."""

from __future__ import annotations

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError
from pipeline.job import Input, Out
from pipeline.settings.ppo import PpoSettings
from stages.common import epoch_order, exact_div
from stages.data import read_texts
from stages.packing import PackedRows, pack_documents
from stages.rollout import Sequences, make_sequences


class PtxRows:
    """Packed text, and this rank's rows of it for each optimiser step.

    tokens_per_step: predicted tokens of one step over all ranks.
    """

    def __init__(
        self,
        item: Input,
        ppo: PpoSettings,
        seed: int,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
        out: Out,
    ) -> None:
        folder = out.checkpoints / "ptx"
        if out.rank == 0:
            texts, tally = read_texts(item.sources)
            pack_documents(texts, tokenizer, folder, 0.0, out.progress)
            out.say(f"text to mix in: {tally.summary()}")
            out.derived["ptx_documents_dropped"] = dict(tally.reasons)
        accelerator.wait_for_everyone()
        self.packed = PackedRows(folder, "train", ppo.ptx_tokens)
        if len(self.packed) == 0:
            raise DataError(
                f"ppo.ptx_data: the text has fewer tokens than one row of {ppo.ptx_tokens}",
                "Give more text or a smaller ppo.ptx_tokens.",
            )
        exact_div(ppo.ptx_rows, accelerator.num_processes, "ppo.ptx_rows")
        self.rows = ppo.ptx_rows
        self.pad_id = tokenizer.pad_token_id
        self.seed = seed
        self.accelerator = accelerator
        self.tokens_per_step = ppo.ptx_rows * (ppo.ptx_tokens - 1)

    def split(self, step: int, parts: int) -> list[Sequences | None]:
        """This rank's rows of a step, shared out over its micro-batches; None where none is left."""
        order = epoch_order(len(self.packed), step * self.rows, self.rows, self.seed, "ppo", "ptx")
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
