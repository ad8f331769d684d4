"""What a speech model would say at every moment of recorded turns: codes for the tokenizer's decoder to learn from.

The decoder of a tokenizer knows the codes of its own encoder. A speech model draws others: of its semantic codebooks
the first is read from the text, the later ones are guesses, and the decoder makes worse speech of guesses. Here the
model guesses the semantic codes of turns that are there, frame by frame, so that every guess has the audio that was
meant beside it (as vocoders are tuned on predicted spectrograms, HiFi-GAN, arXiv 2010.05646, 4.4). Letters: T rows,
n frames, K codebooks, S semantic ones, R clips, W statistics.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset_pipeline import ConversationDataset, Sample
from frames import IGNORE, Rows
from inference_model import InferenceModel
from rvq_tokenizer import RVQTokenizer

PASSES = 2  # in the first the model sees the true codes of what came before, then its guesses of them


def likeliest(logits: Tensor) -> Tensor:
    """(n, V) -> (n,)"""
    return logits.argmax(dim=1)


@torch.inference_mode()
def guess_codes(model: InferenceModel, rows: Rows, n_semantic: int) -> Tensor:
    """(1, T) rows of one document -> (n, S), the likeliest semantic codes of every frame that has targets.

    Codebook 0, and with it what is said when, is the true one; the model sees no acoustic codes, as when it speaks with
    the semantic ones.
    """
    targets, S = rows.targets[0], n_semantic
    before = (targets[:, S - 1] != IGNORE).nonzero().squeeze(1)  # (n,) rows that a frame follows
    first = targets[before, :1]
    mask = rows.mask.clone()
    mask[..., S:-1] = False
    seen = rows._replace(tokens=rows.tokens.clone(), mask=mask)
    guess = targets[before, :S]
    for _ in range(PASSES if len(before) else 0):
        states = model.model.hidden(seen)[0, before]
        guess = model.depth.continue_frames(states, first, S, likeliest)
        seen.tokens[0, before + 1, :S] = guess
    return guess


def guessed_turns(model: InferenceModel, dataset: ConversationDataset) -> dict[str, np.ndarray]:
    """The guesses for all turns of a split by their ids, (frames, S) uint16 each."""
    device, found = next(model.model.parameters()).device, {}
    for sample in tqdm(dataset.samples(), desc="guessing codes", unit="document", dynamic_ncols=True):
        rows = dataset.collate([[sample]], seeds=None).to(device)
        codes = guess_codes(model, rows, model.config.n_semantic).cpu().numpy().astype(np.uint16)
        found |= by_turn(dataset, sample, codes)
    return found


def voices_beside(tokenizer: RVQTokenizer, dataset: ConversationDataset) -> dict[str, np.ndarray]:
    """Of every turn (R, W): the statistics of the codes of the speaker's other turns in its conversation."""
    found: dict[str, np.ndarray] = {}
    for conversation in dataset.conversations:
        ids = [turn.utt_id for turn in conversation.turns]
        codes = (torch.from_numpy(dataset.cache.codes[utt_id].astype(np.int64)) for utt_id in ids)
        own = np.stack([tokenizer.statistics(each.to(tokenizer.device)).cpu().numpy() for each in codes])
        speakers = np.array(conversation.speakers)
        for i, utt_id in enumerate(ids):
            found[utt_id] = own[(speakers == speakers[i]) & (np.arange(len(ids)) != i)]
    return found


def by_turn(dataset: ConversationDataset, sample: Sample, codes: np.ndarray) -> dict[str, np.ndarray]:
    """The codes of all frames learnt in a sample, cut into its turns."""
    conversation = dataset.conversations[sample.conversation]
    ids = [turn.utt_id for turn in conversation.turns[sample.first : sample.stop]]
    ends = np.cumsum([len(dataset.cache.codes[utt_id]) for utt_id in ids])
    return dict(zip(ids, np.split(codes, ends[:-1]), strict=True))
