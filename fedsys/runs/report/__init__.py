"""The HTML page about runs: what is left of them (`loading`), charts, and the page itself."""
