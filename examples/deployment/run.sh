#!/usr/bin/env bash
# A SuperLink and three SuperNodes on this machine, with TLS and node authentication: three rounds, then all is stopped.
#
#     examples/deployment/run.sh [OUT]
#
# The run's folder OUT (runs/deployment) keeps the model and the report; a run that was cut short goes on. Further
# arguments are further run config, as TOML: examples/deployment/run.sh runs/site train.steps=2
set -euo pipefail
set -m # each process below leads a group, which ends with it
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:-runs/deployment}
port=${PORT:-8000} # of the SuperLink; the nodes take the three after it
here=examples/deployment
work=$(mktemp -d)
log=$out/logs
mkdir -p "$log"
overrides=("out=\"$out\"" "${@:2}")

# Flower's own home, so that neither its connections nor its apps are mixed with the user's.
export FLWR_HOME=$work/flwr FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.1

processes=()
stop() {
    for process in "${processes[@]}"; do kill -- "-$process" 2>/dev/null || true; done
    wait
    # A ServerApp whose SuperLink has gone would try again for long.
    for process in "${processes[@]}"; do kill -9 -- "-$process" 2>/dev/null || true; done
    rm -rf "$work"
}
trap stop EXIT
trap 'exit 1' INT TERM HUP

await() { # for SECONDS, until the command succeeds
    for _ in $(seq "$(($1 * 5))"); do
        if "${@:2}" >/dev/null 2>&1; then return; fi
        sleep 0.2
    done
    echo "run.sh: in $1 s not: ${*:2}" >&2
    tail -n 20 "$log"/*.log >&2
    exit 1
}

# Certificates, keys, and, while the others start, the base model, of which every node must have a copy.
python $here/keys.py "$work/keys" --host 127.0.0.1 --nodes 3
python $here/prepare.py $here/run.toml "${overrides[@]/#/--set=}" &
prepared=$!
processes+=($!)

flower-superlink --host 127.0.0.1 --port "$port" --enable-supernode-auth \
    --disable-runtime-dependency-installation --ssl-ca-certfile "$work/keys/ca.pem" \
    --ssl-certfile "$work/keys/server.pem" --ssl-keyfile "$work/keys/server.key" >"$log/superlink.log" 2>&1 &
processes+=($!)

mkdir -p "$FLWR_HOME"
cat >"$FLWR_HOME/config.toml" <<END
[superlink]
default = "site"

[superlink.site]
address = "127.0.0.1:$port"
root-certificates = "$work/keys/ca.pem"
END
await 120 flwr list site

# Each node has a key that the SuperLink knows, a client to be, and a tier that its worker holds.
tiers=(small medium large)
for node in 0 1 2; do
    flwr supernode register "$work/keys/node-$node.pub" site
    flower-supernode --superlink "127.0.0.1:$port" --root-certificates "$work/keys/ca.pem" \
        --auth-supernode-private-key "$work/keys/node-$node" --host 127.0.0.1 --port "$((port + 1 + node))" \
        --node-config "partition-id=$node tiers=\"${tiers[node]}\" worker=\"$work/worker-$node\"" \
        >"$log/node-$node.log" 2>&1 &
    processes+=($!)
done

wait $prepared
# In the background, as a shell in the foreground of a command would not hear that it is to stop.
flwr run . site --stream --run-config "$out/config.toml" &
processes+=($!)
wait $!
test -f "$out/report.html"
