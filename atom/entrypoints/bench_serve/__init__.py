"""The parts of `atom bench serve`, a load generator for OpenAI-compatible servers. Imports no engine."""
