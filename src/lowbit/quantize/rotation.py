"""Orthogonal matrices that spread outliers: Hadamard matrices where they are known, products elsewhere.

Every entry of a Hadamard matrix has the same magnitude, so a single loud channel becomes many quiet ones.
Orders 2**k (Sylvester), q + 1 for primes q = 3 mod 4 and 2 (q + 1) for primes q = 1 mod 4 (Paley) and their
products are built here: 576 = 16 * 36, 896 = 32 * 28, 2560 = 128 * 20. Where the odd part has none, its
cosine transform (DCT-II) takes the place. Signs drawn by a seed make the matrix a random one.
Use for quantization: QuIP arXiv:2307.13304, QuaRot arXiv:2404.00456.
"""

from dataclasses import dataclass

import numpy as np

F32 = np.float32
LARGEST_CORE = 1024  # order of a dense factor that is no power of two


@dataclass(frozen=True)
class Rotation:
    """Q = diag(signs) (left x right), x the Kronecker product: orthogonal [n, n], n = len(left) * len(right).

    signs: float32 [n], 1 or -1; left, right: float32, orthogonal
    """

    signs: np.ndarray
    left: np.ndarray
    right: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x Q of float32 x [.., n]."""
        folded = (x * self.signs).reshape(-1, len(self.left), len(self.right))
        return np.asarray((self.left.T @ (folded @ self.right)).reshape(x.shape))


def make_rotation(n: int, seed: int | None = 0) -> Rotation:
    """An orthogonal [n, n] in two factors. seed: of the signs; None: all 1."""
    core = _core(n)
    right = core
    while 2 * len(right) ** 2 <= n and n // len(right) % 2 == 0:  # factors alike in size: fewest products
        right = np.kron(right, _HADAMARD_2)
    left = np.ones((1, 1))
    while len(left) * len(right) < n:
        left = np.kron(left, _HADAMARD_2)
    signs = np.ones(n) if seed is None else np.random.default_rng(seed).choice((-1.0, 1.0), n)
    return Rotation(signs.astype(F32), left.astype(F32), right.astype(F32))


_HADAMARD_2 = np.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2)


def _core(n: int) -> np.ndarray:
    """The factor of an orthogonal matrix of order n that is not Sylvester's, of the smallest order."""
    odd = n // (n & -n)
    if odd == 1:
        return np.ones((1, 1))
    order = 4 * odd
    while n % order == 0 and order <= LARGEST_CORE:
        found = _paley(order)
        if found is not None:
            return found
        order *= 2
    rows, columns = np.arange(odd)[:, None], np.arange(odd)
    cosines = np.cos(np.pi * (2 * columns + 1) * rows / (2 * odd)) * np.sqrt(2 / odd)
    cosines[0] /= np.sqrt(2)
    return np.asarray(cosines)


def _paley(order: int) -> np.ndarray | None:
    """An orthogonal matrix with entries +-1 / sqrt(order) by Paley's constructions; None: they give none."""
    if _is_prime(order - 1) and order % 4 == 0:
        skew = _residues(order - 1, -1.0)
        return (skew + np.eye(order)) / np.sqrt(order)
    half = order // 2
    if _is_prime(half - 1) and half % 4 == 2:
        symmetric = _residues(half - 1, 1.0)
        first, second = np.array([[1.0, 1.0], [1.0, -1.0]]), np.array([[1.0, -1.0], [-1.0, -1.0]])
        return (np.kron(symmetric, first) + np.kron(np.eye(half), second)) / np.sqrt(order)
    return None


def _residues(prime: int, sign: float) -> np.ndarray:
    """Paley's conference matrix [prime + 1, prime + 1]: quadratic characters of i - j, bordered by ones."""
    character = np.full(prime, -1.0)
    character[np.square(np.arange(prime, dtype=np.int64)) % prime] = 1.0
    character[0] = 0.0
    indices = np.arange(prime)
    matrix = np.zeros((prime + 1, prime + 1))
    matrix[0, 1:], matrix[1:, 0] = 1.0, sign
    matrix[1:, 1:] = character[(indices[:, None] - indices) % prime]
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
