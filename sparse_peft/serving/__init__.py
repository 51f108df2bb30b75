"""Serving many adapters of one base model: batches of requests, and an HTTP server with OpenAI's endpoints."""

from .app import ServerLimits, build_app
from .engine import Engine
from .folders import AdapterFolders
from .jobs import Job
from .requests import RequestError, Sampling
from .server import HttpServer

__all__ = ["AdapterFolders", "Engine", "HttpServer", "Job", "RequestError", "Sampling", "ServerLimits", "build_app"]
