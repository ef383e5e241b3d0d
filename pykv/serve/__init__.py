"""`pykv serve`: an HTTP server that OpenAI's clients talk to. Needs the extras `llm` and `serve`.

fields          the fields of a body, one by one; errors as OpenAI words them
protocol        bodies of the endpoints: prompts and sampling parameters
tools           messages and tools as templates have them; tool calls in answers
constraints     answers that follow a JSON schema, by masks over the vocabulary
engine_process  the process that has the model, and the way to it
engine          orders to a scheduler, tokens to text; of that process
desk            requests to orders, reports to deltas; what waits for each client
replies         answers as bodies, or as chunks while they come
app             endpoints, limits
openapi         their description, by the fields that protocol asks for
middleware      who may ask, errors, the log
connection      how long a header or a client that takes nothing may take
unsupported     fields that have no effect, and those that are refused
load            many clients at once, and how long they wait
metrics         what the server counts, in Prometheus' text format
command         `pykv serve`
page            a page to chat with
"""
