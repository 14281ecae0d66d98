#!/usr/bin/env bash
# Run on a lent GPU what benchmarks/lent_gpu.py has prepared: `OUT=folder bash benchmarks/lent_gpu.sh PART…`, with the parts
#   recipe   configs/reproduce/emoji-64px.yaml, and how near its samples come to training pictures (at most 8 minutes)
#   noisy    another decoder of that run, told how much noise z_i has (at most 4 minutes)
#   tests    tests/test_gpu.py (at most 2 minutes)
#   small    configs/reproduce/small.yaml (at most 5 minutes)
#   decoder  a step of the paper's decoder, with compiled norms and without (at most 5 minutes)
# Each part writes its result before the next begins. Without a GPU, `REHEARSE=1 DEVICE=cpu RECIPE=few-steps.yaml` goes the
# same way, with this environment's packages.
set -o pipefail
export PYTHONUNBUFFERED=1
RUN=/tmp/emoji-64px LOGS=/tmp/logs STARTED=$SECONDS

say() {
  echo "== $((SECONDS - STARTED)) s: $*" | tee -a "$LOGS/times.log"
  tar czf "$OUT/logs.tar.gz" -C "$LOGS" . # one file, whole at every step
}
within() { timeout -k 15 "${LIMIT:-$1}" "${@:2}"; }
unclip() { within "$1" python3 -m unclip_pl "${@:2}"; }

install() {
  mkdir -p $LOGS
  export PYTHONPATH=$PWD/src:$PWD
  if [ -z "$REHEARSE" ]; then
    [ -d /tmp/site ] || python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/site \
      .lent/wheels/*.whl || exit 1
    export PYTHONPATH=$PYTHONPATH:/tmp/site
  fi
  # There is no repository: the tree is the commit that was noted.
  mkdir -p /tmp/bin
  printf '#!/bin/sh\ncase "$*" in *rev-parse*) cat %s ;; esac\n' "$PWD/.lent/commit" > /tmp/bin/git
  chmod +x /tmp/bin/git
  export PATH=/tmp/bin:$PATH
  { nvidia-smi; nproc; python3 -m pip list; } > "$LOGS/machine.log" 2>&1
  say installed
}

# How near samples come to training pictures, of a run's folder.
memorisation() {
  within 100 python3 benchmarks/memorisation.py "$1" --source /tmp/shards --out "$2" --device "${DEVICE:-cuda}" \
    >> "$LOGS/memorisation.log" 2>&1
  say "memorisation of $1: $? $(grep -A 3 retrieval "$2/memorisation.json" | tr -d '\n')"
}

recipe() {
  [ -d /tmp/shards ] || python3 -m tarfile -e .lent/shards.tar.xz /tmp || exit 1
  within 200 python3 -m pytest -q -p no:cacheprovider -p no:xdist tests/test_gpu.py -k recorded_loss \
    > "$LOGS/recorded.log" 2>&1
  status=$?
  tail -40 "$LOGS/recorded.log"
  say "a recorded loss is the loss: $status"
  if [ $status = 1 ]; then # launched kernel by kernel, as many steps as there is time for
    sed -i /RecordedLoss/d configs/{prior,ar_prior,decoder}/emoji-64px.yaml
    sed -i 's/max_steps: 6000/max_steps: 1500/; s/3000/1500/; s/2000/500/' configs/decoder/emoji-64px.yaml
  fi
  unclip 340 reproduce --config "${RECIPE:-configs/reproduce/emoji-64px.yaml}" --source /tmp/shards --run $RUN \
    --jobs "${JOBS:-6}" > "$LOGS/reproduce.log" 2>&1
  say "recipe: $?"
  tail -30 "$LOGS/reproduce.log" | cut -c1-200
  [ -f $RUN/emoji.zip ] && weights
  [ -f $RUN/run.json ] && memorisation $RUN $RUN/memorisation
  (cd $RUN && tar czf "$OUT/run.tar.gz" --exclude='*.ckpt' --exclude=store --exclude='*.zip' .)
}

# The bundle, and the judge, which it leaves out and later measurements need.
weights() {
  python3 -c 'import sys, torch
path, out = sys.argv[1:]
judge = torch.load(path, map_location="cpu", weights_only=False)
halves = {name: value.half() if value.ndim > 1 else value for name, value in judge["state_dict"].items()}
kept = {name: judge[name] for name in ("hyper_parameters", "global_step", "pytorch-lightning_version")}
torch.save(kept | {"state_dict": halves}, out)' $RUN/judge/checkpoints/last.ckpt /tmp/judge.ckpt
  tar c -C $RUN emoji.zip -C /tmp judge.ckpt | split -b 16500000 -d - "$OUT/weights.tar."
}

# A decoder that is told how much noise z_i has reads captions more. Does the judge find more pictures of samples then?
noisy() {
  [ -f $RUN/run.json ] || return
  mkdir -p /tmp/noisy
  unclip 180 fit --config configs/decoder/emoji-64px.yaml --config $RUN/stages/decoder.fit.yaml \
    --config $RUN/stages/decoder.features.yaml --config configs/base/decoder-noise.yaml \
    --trainer.logger.init_args.save_dir /tmp/noisy/decoder $MORE > "$LOGS/noisy.log" 2>&1
  say "decoder with noise on z_i: $?"
  for name in clip judge store prior ar_prior linear.safetensors codec.safetensors; do
    ln -sfn $RUN/$name /tmp/noisy/$name
  done
  for level in 0.0 0.2 0.4; do
    python3 -c 'import json, sys
run = json.load(open(sys.argv[1]))
run["decoder"]["init_args"] |= {"noise_level": float(sys.argv[2]), "upsamplers": []}
json.dump(run, open("/tmp/noisy/run.json", "w"))' $RUN/run.json $level
    memorisation /tmp/noisy /tmp/noisy/$level
  done
}

tests() {
  within 120 python3 -m pytest -q -p no:cacheprovider -p no:xdist tests/test_gpu.py > "$LOGS/test_gpu.log" 2>&1
  say "tests/test_gpu.py: $?"
  tail -8 "$LOGS/test_gpu.log"
}

small() {
  unclip 280 reproduce --config configs/reproduce/small.yaml --run /tmp/small > "$LOGS/small.log" 2>&1
  say "small configs: $?"
  tar czf "$OUT/small.tar.gz" -C /tmp/small stages
  grep -h '"steps_per_second"\|"mfu"\|"peak_memory_bytes"' /tmp/small/stages/*.json
}

decoder() {
  (cd benchmarks && within 270 python3 -W ignore gpu.py decoder --out "$OUT") > "$LOGS/decoder.log" 2>&1
  say "the paper's decoder: $?"
  tail -15 "$LOGS/decoder.log"
}

install
for part in "$@"; do
  $part
done
say done
ls -la "$OUT"
