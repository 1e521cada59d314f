"""Mooncake's transfer engine over TCP, all slices of a pull as one batch."""

import multiprocessing

import peer
from mooncake.engine import TransferEngine


def engine(words):
    made = TransferEngine()
    if made.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
        raise RuntimeError("initialize")
    if made.register_memory(words.ctypes.data, words.nbytes) != 0:
        raise RuntimeError("register_memory")
    return made


def owner(words, pipe):
    made = engine(words)
    pipe.send((f"127.0.0.1:{made.get_rpc_port()}", words.ctypes.data))
    peer.wait_for_end(pipe)


class Reader:
    def __init__(self, words, pipe):
        self.base = words.ctypes.data
        self.engine = engine(words)
        self.owner, self.remote = pipe.recv()

    def prepare(self, case):
        self.local = [self.base + int(at) for at in case.dst]
        self.there = [self.remote + int(at) for at in case.src]
        self.sizes = [case.slice_bytes] * len(self.local)

    def pull(self):
        # Batches of 4096, the most there are, fail now and then.
        for first in range(0, len(self.local), 1024):
            part = slice(first, first + 1024)
            if self.engine.batch_transfer_sync_read(self.owner, self.local[part], self.there[part],
                                                    self.sizes[part]) != 0:
                raise RuntimeError("batch_transfer_sync_read")


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    peer.serve(owner, Reader)
