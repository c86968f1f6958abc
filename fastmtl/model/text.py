"""An encoder of texts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LSTMEncoder"]


class LSTMEncoder(nn.Module):
    """A word embedding and a bidirectional LSTM; the features are the mean and the maximum of its states.

    Args:
        vocabulary: Number of words; word 0 is padding.
        embedding_dim: Size of a word's vector.
        hidden_dim: Size of the state of each direction.
        dropout: Dropout probability of the embeddings and of the features.

    Attributes:
        feature_dim: Number of features, ``4 * hidden_dim``.
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
        # States lie in -1 .. 1; an empty text has -1 everywhere.
        most = states.masked_fill(~is_word, -1).amax(1)
        return F.dropout(torch.cat([mean, most], 1), self.dropout, self.training)
