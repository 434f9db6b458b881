"""Continuous batching of requests that come and go."""

from fastddim.stream.stream import Stream
from fastddim.stream.tickets import Ticket

__all__ = ["Stream", "Ticket"]
