"""Serving many adapters of one base model: batches of requests, and an HTTP server with OpenAI's endpoints."""

from .app import HttpServer, ServerLimits, build_app
from .engine import Engine
from .folders import AdapterFolders
from .jobs import Job
from .requests import RequestError, Sampling

__all__ = ["AdapterFolders", "Engine", "HttpServer", "Job", "RequestError", "Sampling", "ServerLimits", "build_app"]
