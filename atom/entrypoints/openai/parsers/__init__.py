"""Parsers of what models write: reasoning and tool calls, by the names that users know.

A format is one file here, imported when its name is asked for. To add one, write a class after the
contract in `atom.entrypoints.openai.deltas` and enter its names below.
"""

from atom.entrypoints.openai.parsers.registry import ParserFactory, find_parser

__all__ = ["REASONING_PARSERS", "TOOL_PARSERS", "ParserFactory", "get_reasoning_parser", "get_tool_parser"]

# name -> "module:class"
REASONING_PARSERS = {
    "qwen3": "think:OptionalThinking",
    "glm45": "think:OptionalThinking",
    "deepseek_r1": "think:UsualThinking",
    "deepseek_v3": "think:OptionalThinking",  # V3.1 and later: the template opens or closes the reasoning
    "mistral": "think:MistralThinking",
}
TOOL_PARSERS = {
    "hermes": "hermes:HermesToolParser",
    "llama3_json": "llama3_json:Llama3JsonToolParser",
    "llama3": "llama3_json:Llama3JsonToolParser",
    "mistral": "mistral:MistralToolParser",
    "deepseek_v3": "deepseek_v3:DeepSeekV3ToolParser",
    "deepseek_v31": "deepseek_v3:DeepSeekV3ToolParser",
    "deepseek": "deepseek_v3:DeepSeekV3ToolParser",
    "qwen3_coder": "qwen3_coder:Qwen3CoderToolParser",
    "glm45": "glm45:Glm45ToolParser",
}


def get_reasoning_parser(name: str, tokenizer: object) -> ParserFactory:
    """ConfigError for an unknown name."""
    return find_parser("reasoning_parser", REASONING_PARSERS, name, tokenizer)


def get_tool_parser(name: str, tokenizer: object) -> ParserFactory:
    """ConfigError for an unknown name."""
    return find_parser("tool_call_parser", TOOL_PARSERS, name, tokenizer)
