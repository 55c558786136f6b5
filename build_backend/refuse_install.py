"""A build backend (PEP 517) that builds nothing: pip imports it before anything is written, and gets this line."""

raise SystemExit(
    "mini-llama is not installed as a package, it runs from its folder: python -m pip install -r requirements.txt, "
    "then python run_llama.py"
)
