"""`pykv serve`: an HTTP server that OpenAI's clients talk to. Needs the extras `llm` and `serve`.

fields        the fields of a body, one by one; errors as OpenAI words them
protocol      bodies of the endpoints: prompts and sampling parameters
tools         messages and tools as templates have them; tool calls in answers
constraints   answers that follow a JSON schema, by masks over the vocabulary
engine        one thread that owns the LLM; tokens to an event loop
replies       answers as bodies, or as chunks while they come
app           endpoints, keys, limits
openapi       their description, by the fields that protocol asks for
metrics       what the server counts, in Prometheus' text format
command       `pykv serve`
page          a page to chat with
"""
