#!/bin/sh
# One sitting: the peer, jaxmoe in its ways, the peer again. Usage: bench_peers.sh MODEL_DIR PEER_COMMAND...
# PEER_COMMAND prints one JSON object a case, as `jaxmoe bench --json` does. Quote medians and ratios, not seconds.
set -eu
model=$1
shift
cases=${CASES:-1x128x64,8x128x64,32x128x64,32x512x1}
"$@" "$model" --cases "$cases" 2>/dev/null
for kernels in --native --no-native; do
    echo "# jaxmoe $kernels"
    jaxmoe bench "$model" --cases "$cases" --json "$kernels"
done
"$@" "$model" --cases "$cases" 2>/dev/null
