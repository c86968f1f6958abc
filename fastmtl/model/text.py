"""An encoder of texts given as numbers of words."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LSTMEncoder"]


class LSTMEncoder(nn.Module):
    """A word embedding and an LSTM that reads both ways; the mean and the maximum of its states stand for the text.

    Args:
        vocabulary: Number of words; 0 stands for no word and only pads.
        embedding_dim: Size of a word's vector.
        hidden_dim: Size of the state of each direction.
        dropout: Share of the words' vectors and of the features that training sets to zero.

    Attributes:
        feature_dim: Size of what it gives out, ``4 * hidden_dim``.
    """

    def __init__(self, vocabulary: int, embedding_dim: int = 128, hidden_dim: int = 64, dropout: float = 0.4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding_dim, padding_idx=0)
        self.lstm = nn.LSTM(embedding_dim, hidden_dim, batch_first=True, bidirectional=True)
        self.dropout = dropout
        self.feature_dim = 4 * hidden_dim

    def forward(self, words: Tensor) -> Tensor:
        """Return ``(batch, feature_dim)`` features of ``(batch, length)`` words."""
        is_word = words.ne(0).unsqueeze(2)
        vectors = F.dropout(self.embedding(words), self.dropout, self.training)
        states, _ = self.lstm(vectors)
        mean = (states * is_word).sum(1) / is_word.sum(1).clamp(min=1)
        # States lie in -1 .. 1; a text without words has the lowest everywhere.
        most = states.masked_fill(~is_word, -1).amax(1)
        return F.dropout(torch.cat([mean, most], 1), self.dropout, self.training)
