"""The application: its paths, and the form of its errors."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from glm_hf.serving.chat import answer_chat
from glm_hf.serving.guard import Guard, error_response
from glm_hf.serving.metrics import Metrics
from glm_hf.serving.protocol import APIError, ChatRequest, CompletionRequest, validation_error
from glm_hf.serving.service import Service, Settings
from glm_hf.serving.text import answer_completion
from glm_hf.serving.worker import Worker

PAGE = Path(__file__).parent / "page"
PAGE_FILES = ("page.css", "page.js")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def build_app(worker: Worker, tokenizer: Any, settings: Settings, metrics: Metrics) -> FastAPI:
    """
    Return the application.

    Args:
        worker: Where tokens are decoded, running.
        tokenizer: Tokenizer of the model.
        settings: What the server is started with.
        metrics: What is shown at `/metrics`.
    """
    service = Service(worker, tokenizer, settings)
    app = FastAPI(title="glm_hf", docs_url=None, redoc_url=None)

    @app.exception_handler(APIError)
    async def on_api_error(request: Request, error: APIError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(request: Request, error: RequestValidationError) -> Response:
        return error_response(validation_error(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        return error_response(APIError(str(error.detail), error.status_code))

    @app.exception_handler(Exception)
    async def on_error(request: Request, error: Exception) -> Response:
        return error_response(APIError("the server failed, as its log tells", 500))

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await answer_completion(service, body, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await answer_chat(service, body, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [describe_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.require_model(name)
        return describe_model(service)

    @app.get("/health")
    async def health() -> Response:
        is_well = worker.is_alive()
        return JSONResponse({"status": "ok" if is_well else "failed"}, 200 if is_well else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/")
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    @app.get("/{name}")
    async def page_file(name: str) -> Response:
        if name not in PAGE_FILES:
            raise APIError(f"there is nothing at /{name[:80]}", 404)
        return FileResponse(PAGE / name, headers=PAGE_HEADERS)

    app.add_middleware(Guard, metrics=metrics, api_key=settings.api_key, most_bytes=settings.most_bytes)
    return app


def describe_model(service: Service) -> dict[str, Any]:
    """Return what `/v1/models` tells of the model."""
    name = service.settings.model_name
    window = service.worker.decoder.engine.max_length
    return {"id": name, "object": "model", "created": service.created, "owned_by": "glm_hf", "max_model_len": window}
