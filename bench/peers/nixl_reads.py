"""NIXL over UCX. What a request costs is counted from posting to completion; descriptor lists are made before."""

import multiprocessing

import peer
from nixl_cu13._api import nixl_agent, nixl_agent_config


def agent(name, words):
    made = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
    made.register_memory([(words.ctypes.data, words.nbytes, 0, "kv")], "DRAM")
    return made


def owner(words, pipe):
    made = agent("owner", words)
    pipe.send((made.get_agent_metadata(), words.ctypes.data))
    peer.wait_for_end(pipe)


class Reader:
    def __init__(self, words, pipe):
        self.base = words.ctypes.data
        self.agent = agent("reader", words)
        metadata, self.remote = pipe.recv()
        self.owner = self.agent.add_remote_agent(metadata)
        self.handle = None

    def prepare(self, case):
        if self.handle is not None:
            self.agent.release_xfer_handle(self.handle)
        size = case.slice_bytes
        local = self.agent.get_xfer_descs([(self.base + int(at), size, 0) for at in case.dst], "DRAM")
        remote = self.agent.get_xfer_descs([(self.remote + int(at), size, 0) for at in case.src], "DRAM")
        self.handle = self.agent.initialize_xfer("READ", local, remote, self.owner)

    def pull(self):
        state = self.agent.transfer(self.handle)
        while state == "PROC":
            state = self.agent.check_xfer_state(self.handle)
        if state != "DONE":
            raise RuntimeError(state)


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    peer.serve(owner, Reader)
