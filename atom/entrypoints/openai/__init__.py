"""The HTTP server: OpenAI's protocol over an AsyncLLMEngine. `api_server.create_app` makes the application."""
