"""Memory for weights: aligned, never overlapping, freed piece by piece."""

import weakref

import numpy as np

from lowbit.model.arena import CHUNK_BYTES, Arena


def test_arrays_are_aligned_and_apart(rng):
    arena = Arena()
    arrays = []
    for i in range(200):
        shape = (int(rng.integers(1, 40)), int(rng.integers(1, 3000)))
        dtype = (np.uint8, np.float16, np.float32, np.uint16)[i % 4]
        array = arena.empty(shape, dtype)
        assert (
            array.shape == shape
            and array.dtype == dtype
            and array.flags.c_contiguous
            and array.flags.writeable
        )
        assert array.ctypes.data % 64 == 0
        array.view(np.uint8)[:] = i % 256
        arrays.append(array)
    for i, array in enumerate(arrays):
        assert (array.view(np.uint8) == i % 256).all()


def test_large_arrays_have_their_own_memory():
    arena = Arena()
    small = arena.empty((10,), np.uint8)
    large = arena.empty((CHUNK_BYTES * 2,), np.uint8)
    assert large.nbytes == CHUNK_BYTES * 2 and large.ctypes.data % 64 == 0
    assert not np.shares_memory(small, large)
    after = arena.empty((10,), np.uint8)
    assert after.ctypes.data - small.ctypes.data == 64  # the piece in use goes on


def test_pieces_are_freed_with_their_arrays():
    arena = Arena()
    first = arena.empty((CHUNK_BYTES // 5,), np.uint8)
    owner = first
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    gone = weakref.ref(owner)
    del owner
    for _ in range(6):
        arena.empty((CHUNK_BYTES // 5,), np.uint8)
    assert gone() is not None
    del first
    assert gone() is None
