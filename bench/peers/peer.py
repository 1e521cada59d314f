"""What the programs of this folder share: kvrelay bench pull starts each beside itself and talks to it in lines (see
tools/kvrelay/bench/pull_way.h). Owner and reader are two processes here, too."""

import multiprocessing
import os
import sys
import time

import numpy as np


def pattern(memory_bytes):
    """The owner's memory, as tools/kvrelay/bench/pull_case.cc fills it."""
    index = np.arange(1, memory_bytes // 8 + 1, dtype=np.uint64)
    words = index * np.uint64(0x9E3779B97F4A7C15)
    return (words & np.uint64(0x83FF83FF83FF83FF)) | np.uint64(0x3C003C003C003C00)


class Case:
    """The slices of one pull, in bytes from the start of either side's memory."""

    def __init__(self, file):
        numbers = np.fromfile(file, dtype=np.uint64)
        self.slice_bytes = int(numbers[0])
        pairs = numbers[2:].reshape(int(numbers[1]), 2)
        self.src = pairs[:, 0].copy()
        self.dst = pairs[:, 1].copy()


def rows(words, slice_bytes, offsets):
    """One row of words for each slice."""
    return words.reshape(-1, slice_bytes // 8), (offsets // np.uint64(slice_bytes)).astype(np.int64)


def wait_for_end(pipe):
    """Until the other end of the pipe is gone."""
    try:
        pipe.recv()
    except EOFError:
        pass


def serve(make_owner, make_reader):
    """make_owner(words, pipe) tells the reader by the pipe what it needs and then waits for its end;
    make_reader(words, pipe) gives an object with prepare(case) and pull()."""
    # What libraries print is not for the benchmark.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    memory_bytes = int(sys.argv[-1])
    ours, theirs = multiprocessing.Pipe()
    owner = multiprocessing.Process(target=make_owner, args=(pattern(memory_bytes), theirs), daemon=True)
    owner.start()
    words = np.zeros(memory_bytes // 8, dtype=np.uint64)
    reader = make_reader(words, ours)
    expected = pattern(memory_bytes)
    case = None
    print("ready", file=answers)
    for line in sys.stdin:
        verb, _, argument = line.strip().partition(" ")
        try:
            answer = "ok"
            if verb == "case":
                case = Case(argument)
                reader.prepare(case)
            elif verb == "erase":
                table, at = rows(words, case.slice_bytes, case.dst)
                table[at] = 0
            elif verb == "pull":
                start = time.perf_counter()
                reader.pull()
                answer = repr(time.perf_counter() - start)
            elif verb == "check":
                got, to = rows(words, case.slice_bytes, case.dst)
                want, source = rows(expected, case.slice_bytes, case.src)
                answer = "right" if np.array_equal(got[to], want[source]) else "wrong"
        except Exception as error:  # the benchmark goes on without us, and says why
            answer = f"failed {error!r}".replace("\n", " ")
        print(answer, file=answers)
