"""A subscriber of KV events on libzmq, which keeps an index of blocks and knows nothing else."""

import zmq

try:
    from msgpack import unpackb
except ImportError:
    from msgspec.msgpack import decode as unpackb

CONTEXT = zmq.Context()


class Index:
    def __init__(self):
        # Parent and tokens by hash.
        self.blocks = {}
        self.next_seq, self.first_seq, self.num_removed = 0, None, 0

    def apply(self, seq, payload):
        assert seq == self.next_seq, f"batch {seq} after {self.next_seq - 1}"
        self.next_seq += 1
        if self.first_seq is None:
            self.first_seq = seq
        _, events, rank = unpackb(payload)
        assert rank == 0
        for event in events:
            kind = event["type"]
            if kind == "BlockStored":
                parent, size = event["parent_block_hash"], event["block_size"]
                for index, block in enumerate(event["block_hashes"]):
                    tokens = event["token_ids"][index * size:(index + 1) * size]
                    assert len(tokens) == size and block not in self.blocks
                    self.blocks[block] = (parent, tokens)
                    parent = block
            elif kind == "BlockRemoved":
                for block in event["block_hashes"]:
                    del self.blocks[block]
                    self.num_removed += 1
            elif kind == "AllBlocksCleared":
                self.blocks.clear()
            else:
                raise AssertionError(kind)

    def num_found(self, prompt):
        """Tokens of a prompt that are there, in full blocks, without its last token."""
        children = {(parent, tuple(tokens)): block for block, (parent, tokens) in self.blocks.items()}
        size = len(next(iter(self.blocks.values()))[1])
        parent, num_found = None, 0
        for start in range(0, len(prompt) - size, size):
            parent = children.get((parent, tuple(prompt[start:start + size])))
            if parent is None:
                break
            num_found += size
        return num_found


class Subscriber:
    def __init__(self, port, replay_port):
        self.index, self.replay_port = Index(), replay_port
        self.socket = CONTEXT.socket(zmq.SUB)
        self.socket.connect(f"tcp://127.0.0.1:{port}")
        self.socket.setsockopt(zmq.SUBSCRIBE, b"kv@")

    def take(self):
        """All that has come; what was missed is asked for again."""
        while self.socket.poll(50):
            _, seq, payload = self.socket.recv_multipart()
            seq = int.from_bytes(seq, "big")
            if seq > self.index.next_seq:
                self.replay(self.replay_port, self.index.next_seq, self.index, seq)
            self.index.apply(seq, payload)

    @staticmethod
    def replay(port, start, index, end=None):
        """What is kept from `start` on, up to before `end`, into an index; how many batches that were."""
        with CONTEXT.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(f"tcp://127.0.0.1:{port}")
            socket.send_multipart([b"", start.to_bytes(8, "big")])
            num = 0
            while True:
                assert socket.poll(5000), "no replay"
                _, seq, payload = socket.recv_multipart()
                if not payload:
                    return num
                seq = int.from_bytes(seq, "big")
                if end is None or seq < end:
                    index.apply(seq, payload)
                    num += 1
