"""The numbers of a header of version 2: variable-length integers and texts, and their reader, which trusts nothing."""

import struct
from dataclasses import dataclass, field

_MOST = 1 << 64


@dataclass(slots=True)
class Writer:
    """Bytes that are put together."""

    data: bytearray = field(default_factory=bytearray)

    def byte(self, value: int) -> None:
        """A number below 256."""
        self.data.append(value)

    def number(self, value: int) -> None:
        """A number from 0 to 2^64 - 1, seven bits a byte, the lowest first; the last byte is below 128."""
        if not 0 <= value < _MOST:
            raise ValueError(f"{value} is not a number from 0 to 2^64 - 1")
        while value > 127:
            self.data.append(value & 127 | 128)
            value >>= 7
        self.data.append(value)

    def whole(self, value: int) -> None:
        """A number from -2^63 to 2^63 - 1: 2 n, or -2 n - 1 if it is negative."""
        self.number(2 * value if value >= 0 else -2 * value - 1)

    def seed(self, value: int | None) -> None:
        """0 for none, else 1 more than ``whole``."""
        self.number(0 if value is None else 1 + (2 * value if value >= 0 else -2 * value - 1))

    def float(self, value: float) -> None:
        """A float of 8 bytes."""
        self.data += struct.pack("<d", value)

    def text(self, value: str) -> None:
        """The number of bytes, and UTF-8."""
        data = value.encode()
        self.number(len(data))
        self.data += data


@dataclass(slots=True)
class Reader:
    """Takes bytes apart from the first one on; ValueError at their end, or where a number is not in shortest form."""

    data: bytes
    at: int = 0

    def __len__(self) -> int:
        return len(self.data) - self.at

    def byte(self) -> int:
        """The next byte."""
        if self.at >= len(self.data):
            raise ValueError("the header ends too early")
        self.at += 1
        return self.data[self.at - 1]

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > len(self):
            raise ValueError("the header ends too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def since(self, place: int) -> bytes:
        """The bytes that were taken since a place."""
        return self.data[place : self.at]

    def number(self) -> int:
        """A number from 0 to 2^64 - 1."""
        value = shift = 0
        while (byte := self.byte()) > 127:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                break
        value |= byte << shift
        if (shift and not byte) or value >= _MOST:
            raise ValueError("a number is not in its shortest form, or has more than 64 bits")
        return value

    def below(self, limit: int) -> int:
        """A number that is less than another."""
        if (value := self.number()) >= limit:
            raise ValueError(f"{value} where there must be less than {limit}")
        return value

    def whole(self) -> int:
        """A number from -2^63 to 2^63 - 1."""
        value = self.number()
        return -(value >> 1) - 1 if value & 1 else value >> 1

    def seed(self) -> int | None:
        """None, or a number from -2^63 to 2^63 - 2."""
        value = self.number() - 1
        return None if value < 0 else -(value >> 1) - 1 if value & 1 else value >> 1

    def float(self) -> float:
        """A float of 8 bytes."""
        return struct.unpack("<d", self.take(8))[0]

    def text(self) -> str:
        """UTF-8."""
        return self.take(self.number()).decode()
