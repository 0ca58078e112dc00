#!/usr/bin/env python3
"""A doorbell client in another language: Python's standard library and `shm/LAYOUT.md`, nothing else.

It connects, maps the segment, opens a connection, and makes calls whose request fits one slot (1 KiB); answers may
have any length and come frame by frame. One thread; x86-64, where aligned stores of eight bytes become visible in order.

Usage: examples/client.py SOCKET            echoes, asks for the counters, and reads the words of a model as they come
       examples/client.py SOCKET TYPE BODY  one call of message type TYPE (a number); prints its answer. It belongs to
                                            the trace that the environment names in TRACEPARENT
"""
import ctypes
import fcntl
import json
import mmap
import os
import select
import socket
import struct
import sys
import threading
import time

PING, ECHO, STATS, COMPLETE, CHAT, ANALYZE_FILE = 1, 2, 3, 16, 17, 18
RAW, JSON = 0, 1  # codecs

# Layout, version 1: the limits, kinds, flags and codes that are needed here.
MAGIC = int.from_bytes(b"DOORBELL", "little")
CALL, FRAME, OPEN, REPLY = 1, 2, 3, 6
MORE, END, META = 1, 2, 16
TRACEPARENT = 1  # an element of metadata
WAITER_SOCKET = 2
STATUS = ["Ok", "UnknownType", "TooLarge", "DecodeError", "HandlerPanic", "DeadlineExceeded", "Cancelled",
          "Overloaded", "Internal", "TakenBack", "Upstream"]
REFUSED = ["Ok", "VersionMismatch", "NotPermitted", "TooMany", "NoMemory", "Draining", "BadHello"]
GOODBYE = ["", "ProtocolViolation", "PeerDied", "HandshakeTimeout", "Quota", "SlowConsumer", "DoorbellAbuse",
           "IdleTimeout", "Draining"]

# The smallest geometry: rings of 16 entries, four slots of 1 KiB, nothing to lease. Offsets as LAYOUT.md draws them.
RING_ORDER, SLOTS, SLOT = 4, 4, 1024
GEOMETRY = RING_ORDER | SLOTS << 24
PUBLISHED, CONSUMED, SERVER_BELL, CLIENT_BELL = 256, 320, 384, 448
HINTS, CLIENT_WORDS, SUBMISSIONS, COMPLETIONS, PAYLOAD = 512, 640, 768, 1792, 4096

FUTEX_WAKE, SYS_FUTEX = 1, 202
F_GET_SEALS, SEALED = 1034, 1 | 2 | 4  # no further seals, no shrinking, no growing
libc = ctypes.CDLL(None, use_errno=True)


class DoorbellError(Exception):
    """Why there is no answer."""


class Client:
    """A session with one connection."""

    def __init__(self, path, codec=RAW):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(path)
        self._check_server()
        hello = struct.pack("<QHHIQQQQQQ32s", MAGIC, 1, 1, 1, 0, GEOMETRY, *struct.unpack("<QQ", os.urandom(16)),
                            time.clock_gettime_ns(time.CLOCK_MONOTONIC), 0, b"client.py")
        self.socket.send(hello)
        message, fds, _, _ = socket.recv_fds(self.socket, 128, 1)
        self.doorbell_kind = self._judge(message, fds)
        self._map(message, fds[0])
        # The positions are ours alone: shared memory is never asked for them.
        self.sent = self.taken = 0
        self.free = list(range(SLOTS))
        self.generations = [0] * SLOTS
        self.codec = codec
        self.connection = self._open()

    def _check_server(self):
        pid_uid_gid = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if struct.unpack("3i", pid_uid_gid)[1] != os.getuid():
            raise DoorbellError("the server is another user's")

    def _judge(self, message, fds):
        if len(message) == 16:
            raise DoorbellError(f"the server ended the session: {goodbye(message)}")
        if len(message) != 96 or struct.unpack_from("<Q", message)[0] != MAGIC:
            raise DoorbellError("this is no doorbell server")
        code, _, kind = struct.unpack_from("<HHI", message, 8)
        if code != 0:
            raise DoorbellError(f"refused: {REFUSED[code] if code < len(REFUSED) else code}")
        if len(fds) != 1:
            raise DoorbellError("the segment's descriptor did not come")
        return kind

    def _map(self, welcome, fd):
        if fcntl.fcntl(fd, F_GET_SEALS) & SEALED != SEALED:
            raise DoorbellError("the segment is not sealed: its size could change under us")
        self.memory = mmap.mmap(fd, os.fstat(fd).st_size)
        os.close(fd)
        self.words = memoryview(self.memory).cast("Q")
        self.halves = memoryview(self.memory).cast("I")
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        geometry, = struct.unpack_from("<Q", welcome, 24)
        identity = struct.unpack_from("<3Q", welcome, 40)
        if tuple(self.words[i] for i in (0, 4, 5, 6, 7)) != (MAGIC, *identity, geometry) or geometry != GEOMETRY:
            raise DoorbellError("the segment is not the one that the server promised")

    def call(self, message_type, body, traceparent=None):
        """The whole answer to a request; `traceparent` is that of W3C Trace Context, version 00."""
        return b"".join(self.stream(message_type, body, traceparent))

    def stream(self, message_type, body, traceparent=None):
        """The answer frame by frame, each as it comes."""
        metadata = element(TRACEPARENT, traceparent.encode()) if traceparent else b""
        slot, generation = self._submit(CALL, message_type, body, metadata)
        return self._frames(slot, generation)

    def _open(self):
        """Opens a connection; its number."""
        slot, generation = self._submit(OPEN, 0, b"")
        _, status, length, _, number = self._completion(slot, generation)
        self._finish(slot, status, length)
        return number

    def _frames(self, slot, generation):
        released = 0
        while True:
            kind, status, length, _, _ = self._completion(slot, generation)
            if kind == REPLY:
                answer = self._finish(slot, status, length)
                if answer:
                    yield answer
                return
            frame = self._read(slot, length)
            # Done with: the server may write the next frame into the same slot.
            released += 1
            self._say(slot, generation, released)
            try:
                yield frame
            except GeneratorExit:
                self._give_up(slot, generation, released)
                raise

    def _say(self, slot, generation, released, cancelled=False):
        """Says in the slot's word what is wanted of the answer, and hints at it."""
        self.words[CLIENT_WORDS // 8 + slot] = generation | cancelled << 32 | (released & 0x7FFFFFFF) << 33
        self._hint(slot)
        self._ring()

    def _give_up(self, slot, generation, released):
        """Nobody wants the rest of an answer: its slot is free once its end has come."""
        self._say(slot, generation, released, cancelled=True)
        while self._completion(slot, generation)[0] != REPLY:
            released += 1
            self._say(slot, generation, released, cancelled=True)
        self.free.append(slot)

    def _submit(self, kind, message_type, body, metadata=b""):
        length = len(metadata) + len(body)
        if length > SLOT:
            raise DoorbellError(f"a request of {length} bytes: this client sends {SLOT} at most")
        if not self.free:
            raise DoorbellError("every slot is in use: read the streams that are open, or close them")
        slot = self.free.pop()
        generation = self.generations[slot] = (self.generations[slot] + 1) & 0xFFFFFFFF
        self.memory[PAYLOAD + slot * SLOT:PAYLOAD + slot * SLOT + length] = metadata + body
        call = kind == CALL
        flags = (END if call else 0) | (META if metadata else 0)
        entry = [
            # word 0 is the one that publishes: lap, kind, flags, codec
            (self.sent >> RING_ORDER) + 1 & 0xFFFFFFFF | kind << 32 | flags << 40 | self.codec << 56,
            message_type | (self.connection if call else 0) << 32,
            slot | generation << 32,
            length | len(metadata) << 32 | (1 if call else 0) << 48,
            slot if call else 0,
            len(body) if call else 0,
            0,
            0,
        ]
        # At most four calls are in flight in a ring of sixteen: there is always room.
        at = SUBMISSIONS // 8 + 8 * (self.sent % (1 << RING_ORDER))
        for word in range(7, -1, -1):
            self.words[at + word] = entry[word]
        self.sent += 1
        self._ring()
        return slot, generation

    def _hint(self, slot):
        # One thread writes here, and the server exchanges whole words: what it took, it has taken.
        self.words[HINTS // 8 + 1] |= 1 << slot
        self.words[HINTS // 8] |= 1

    def _ring(self):
        fence()
        if self.halves[SERVER_BELL // 4] == 0:
            return
        self.halves[SERVER_BELL // 4] = 0
        if self.doorbell_kind == 0:
            libc.syscall(SYS_FUTEX, ctypes.c_void_p(self.address + SERVER_BELL), FUTEX_WAKE, 0x7FFFFFFF, None, None, 0)
        else:
            try:
                self.socket.send(b"\x01", socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass  # It has not read the last one: it is awake, or about to be.

    def _completion(self, slot, generation):
        """Waits for the next completion; calls are made one after the other, so it is this call's."""
        word = COMPLETIONS // 8 + 4 * (self.taken % (1 << RING_ORDER))
        lap = (self.taken >> RING_ORDER) + 1 & 0xFFFFFFFF
        while self.words[word] & 0xFFFFFFFF != lap:
            self._sleep(word, lap)
        head, name, place, detail = self.words[word:word + 4]
        self.taken += 1
        self.halves[CONSUMED // 4] = self.taken & 0xFFFFFFFF
        fence()
        if self.halves[SERVER_BELL // 4] == 2:
            self._ring()
        if name != slot | generation << 32:
            raise DoorbellError("an answer to another call: give this one up before making the next")
        return head >> 32 & 0xFF, head >> 40 & 0xFF, place & 0xFFFFFFFF, place >> 32, detail

    def _sleep(self, word, lap):
        """Marks the bell, looks again, and waits for the socket: for a byte, or for the end of the session."""
        self.halves[CLIENT_BELL // 4] = WAITER_SOCKET
        fence()
        if self.words[word] & 0xFFFFFFFF == lap:
            return
        select.select([self.socket], [], [])
        message = self.socket.recv(64)
        if not message:
            raise DoorbellError("the server has gone")
        if message[:4] == b"BYE\0":
            raise DoorbellError(f"the server ended the session: {goodbye(message)}")

    def _read(self, slot, length):
        return self.memory[PAYLOAD + slot * SLOT:PAYLOAD + slot * SLOT + min(length, SLOT)]

    def _finish(self, slot, status, length):
        answer = self._read(slot, length)
        self.free.append(slot)
        if status != 0:
            name = STATUS[status] if status < len(STATUS) else str(status)
            text = answer.decode(errors="replace")
            raise DoorbellError(f"{name}: {text}" if text else name)
        return answer


def element(kind, value):
    """An element of metadata: type, length, value, zeros up to a multiple of four bytes."""
    return struct.pack("<HH", kind, len(value)) + value + bytes(-len(value) % 4)


_lock = threading.Lock()


def fence():
    """A full fence: taking a lock is an atomic exchange."""
    with _lock:
        pass


def goodbye(message):
    reason, = struct.unpack_from("<I", message, 4)
    return GOODBYE[reason] if reason < len(GOODBYE) else str(reason)


def main():
    if len(sys.argv) not in (2, 4):
        sys.exit(__doc__)
    if len(sys.argv) == 4:
        message_type = int(sys.argv[2])
        client = Client(sys.argv[1], JSON if message_type in (COMPLETE, CHAT, ANALYZE_FILE) else RAW)
        sys.stdout.buffer.write(client.call(message_type, sys.argv[3].encode(), os.environ.get("TRACEPARENT")) + b"\n")
        return
    client = Client(sys.argv[1])
    for i in range(50):
        for text in [b"hello", b"from", b"Python", bytes(range(i, i + 200))]:
            assert client.call(ECHO, text) == text
    print("200 requests answered, byte for byte")
    begun = time.perf_counter()
    for _ in range(1000):
        client.call(PING, b"")
    print(f"a ping took {(time.perf_counter() - begun) * 1e3:.1f} µs on average")
    print(f"the server has answered {json.loads(client.call(STATS, b''))['calls']} calls")
    question = {"messages": [{"role": "user", "content": "say a few words " * 20}], "model": "loopback", "stream": True}
    for chunk in records(Client(sys.argv[1], JSON).stream(CHAT, json.dumps(question).encode())):
        print(chunk.get("text", ""), end="", flush=True)
    print()


def records(frames):
    """The chunks of a streamed answer: each a length of four bytes and so much JSON, cut anywhere by frames."""
    kept = b""
    for frame in frames:
        kept += frame
        while len(kept) >= 4 and len(kept) >= 4 + (length := int.from_bytes(kept[:4], "little")):
            yield json.loads(kept[4:4 + length])
            kept = kept[4 + length:]


if __name__ == "__main__":
    try:
        main()
    except (DoorbellError, OSError) as error:
        sys.exit(f"client.py: {error}")
