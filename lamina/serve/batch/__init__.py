"""Answer a file of requests: the batch format of OpenAI's API, from the command line and behind ``/v1/batches``.

`lines` reads the file, `journal` keeps what has been answered, `run` answers the rest.
"""
