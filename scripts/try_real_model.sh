#!/bin/sh
# Run a real small model (SmolLM2-135M-Instruct) on one device and on a mesh of 8, and compare with transformers.
# Makes the environment it needs (VENV, .venv by default) and converts the model once, into .cache.
set -eu
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
model=.cache/smollm2-135m-instruct
make --silent "$venv/oracle.stamp" VENV="$venv"
"$venv/bin/python" -m scripts.gguf_to_hf "$model"
answers=$(mktemp -d)
trap 'rm -rf "$answers"' EXIT
answer() { # FILE PROMPT OPTIONS...
    file=$1 prompt=$2
    shift 2
    set -- "$@" --max-tokens 60 --ignore-eos --dtype float32 --json
    echo "\$ jaxmoe generate $model --prompt \"$prompt\" $*"
    "$venv/bin/jaxmoe" generate "$model" --prompt "$prompt" "$@" >"$answers/$file.json"
}
plain=$("$venv/bin/python" -c "from scripts.real_model import PLAIN; print(PLAIN)")
chat=$("$venv/bin/python" -c "from scripts.real_model import CHAT; print(CHAT)")
answer plain-1 "$plain" --devices 1
answer chat-1 "$chat" --chat --devices 1
answer plain-8 "$plain" --devices 8 --mesh data=2,tensor=2,pipeline=2
answer chat-8 "$chat" --chat --devices 8 --mesh data=2,tensor=2,pipeline=2
"$venv/bin/python" -m scripts.real_model "$model" "$answers"/*.json
