"""Rows of pretraining text that PPO mixes into its steps (InstructGPT, arXiv 2203.02155, eq. 2)."""

from __future__ import annotations

import json
from collections.abc import Iterator

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from pipeline import worker
from pipeline.errors import ConfigError, DataError, Stopped
from pipeline.job import Input, Out
from pipeline.settings import Settings
from stages.common import epoch_order, exact_div
from stages.data import read_texts
from stages.packing import PackedRows, pack_documents
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
            self._pack(item, settings, tokenizer, out)
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

    def _pack(
        self, item: Input, settings: Settings, tokenizer: PreTrainedTokenizerBase, out: Out
    ) -> None:
        """Tokenise the text once; a resumed run finds the files, and the counts, again."""
        own = settings.pretrain
        folder, counts = out.checkpoints / "ptx", out.checkpoints / "ptx.json"
        texts, tally = read_texts(item.sources, own.text_field, own.max_documents)

        def checked() -> Iterator[str]:
            for text in texts:
                if worker.stop_requested():
                    raise Stopped("ppo: stopped by a signal while reading the text to mix in")
                yield text
            tally.check("ppo.ptx_data", own.max_bad_fraction)

        # pretraining's held-out part stays held out: the perplexity is measured on it
        done = pack_documents(checked(), tokenizer, folder, own.heldout_fraction, out.progress)
        if done is not None:
            out.say(f"text to mix in: {tally.summary()}")
            counts.write_text(json.dumps(dict(tally.reasons)), encoding="utf-8")
        out.derived["ptx_documents_dropped"] = json.loads(counts.read_text(encoding="utf-8"))

    def rollouts_at_once(self, rollouts: int, vocab_size: int) -> int:
        """Rollouts of a micro-batch so that its share of the text is no larger than one itself."""
        device, ranks = self.accelerator.device, self.accelerator.num_processes
        tokens = self.rows // ranks * self.packed.length
        parts = -(-tokens // tokens_at_once(device, vocab_size))
        return max(1, rollouts // parts)

    def split(self, step: int, parts: int) -> list[Sequences | None]:
        """This rank's rows of a step, shared out over its micro-batches; None where none is left."""
        purpose = ("ppo", "ptx") if self.round == 1 else ("ppo", "ptx", self.round)
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
