"""What a model does, beside whether it wins: defects of its responses, refusals, toxicity, its context
window, benchmarks; and the alarms that a policy has gone wrong.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.job import Inputs, Metrics, Out
from pipeline.records import Prompt, Tally, write_jsonl
from pipeline.settings import Settings
from pipeline.tasks import Task, read_task
from stages.answering import Answers, once
from stages.benchmarks import Asked, differences, figures, score_task
from stages.chat import decode_response, encode_prompt
from stages.common import num_parameters, own_share, seed_for
from stages.context_window import lengths_to_try, loss_by_position, needle_test
from stages.data import rows_of
from stages.formats_of_xstest import read_refusal_prompts
from stages.generation import generate
from stages.intervals import difference, share
from stages.likelihood import positions_of
from stages.prompts import PromptIds, load_prompts
from stages.refusals import agreement, classify, is_safe, rates, read_annotations
from stages.rollout import mean_repetition
from stages.rules import Rule, load_rule
from stages.task_data import Item, Row, read_items
from stages.toxicity import scores_of, toxicity_figures
