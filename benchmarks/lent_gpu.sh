#!/usr/bin/env bash
# Run on a lent GPU what benchmarks/lent_gpu.py has prepared. Results go to $OUT, each before the next part begins.
#   first   the recipe for one GPU, how near its samples come to training pictures, another decoder, tests/test_gpu.py: 9 minutes
#   second  the small configs to their end, and a step of the paper's decoder: some 5 minutes
# Without a GPU, `REHEARSE=1 DEVICE=cpu RECIPE=few-steps.yaml` goes the same way, with this environment's packages.
set -o pipefail
export PYTHONUNBUFFERED=1
RUN=/tmp/emoji-64px STARTED=$SECONDS

say() { echo "== $((SECONDS - STARTED)) s: $*" | tee -a "$OUT/times.txt"; }

install() {
  export PYTHONPATH=$PWD/src:$PWD
  if [ -z "$REHEARSE" ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .lent/wheels/*.whl || exit 1
    export PYTHONPATH=$PYTHONPATH:/tmp/site
  fi
  # There is no repository: the tree is the commit that was noted.
  mkdir -p /tmp/bin
  printf '#!/bin/sh\ncase "$*" in *rev-parse*) cat %s ;; esac\n' "$PWD/.lent/commit" > /tmp/bin/git
  chmod +x /tmp/bin/git
  export PATH=/tmp/bin:$PATH
  { nvidia-smi; nproc; python3 -m pip list; } > "$OUT/machine.txt" 2>&1
  say installed
}

first() {
  tar xJf .lent/shards.tar.xz -C /tmp
  timeout 150 python3 -m pytest -q -p no:cacheprovider -p no:xdist tests/test_gpu.py -k recorded_loss > "$OUT/recorded.log" 2>&1
  status=$?
  tail -40 "$OUT/recorded.log"
  say "a recorded loss is the loss: $status"
  [ $status = 0 ] || exit 1 # the decoder would take too long
  timeout "${LIMIT:-380}" python3 -m unclip_pl reproduce --config "${RECIPE:-configs/reproduce/emoji-64px.yaml}" \
    --source /tmp/shards --run $RUN --jobs "${JOBS:-6}" > "$OUT/reproduce.log" 2>&1
  say "recipe: $?"
  tail -30 "$OUT/reproduce.log" | cut -c1-200
  timeout "${LIMIT:-100}" python3 benchmarks/memorisation.py $RUN --source /tmp/shards --out $RUN/memorisation \
    --device "${DEVICE:-cuda}" > "$OUT/memorisation.log" 2>&1
  say "memorisation: $?"
  tail -30 "$OUT/memorisation.log"
  python3 -c 'import sys, torch
path, out = sys.argv[1:]  # the bundle leaves the judge out, which later measurements need
judge = torch.load(path, map_location="cpu", weights_only=False)
halves = {name: value.half() if value.ndim > 1 else value for name, value in judge["state_dict"].items()}
kept = {name: judge[name] for name in ("hyper_parameters", "global_step", "pytorch-lightning_version")}
torch.save(kept | {"state_dict": halves}, out)' $RUN/judge/checkpoints/last.ckpt /tmp/judge.ckpt
  (cd $RUN && tar cJf "$OUT/run.tar.xz" --exclude='*.ckpt' --exclude=store --exclude='*.zip' .)
  tar c -C $RUN emoji.zip -C /tmp judge.ckpt | split -b 16500000 -d - "$OUT/weights.tar."
  say collected
  noisy
  timeout 120 python3 -m pytest -q -p no:cacheprovider -p no:xdist tests/test_gpu.py > "$OUT/test_gpu.log" 2>&1
  say "tests/test_gpu.py: $?"
  tail -8 "$OUT/test_gpu.log"
}

# A decoder that is told how much noise z_i has reads captions more. Does the judge find more pictures of a prior's samples then?
noisy() {
  mkdir -p /tmp/noisy
  python3 -m unclip_pl fit --config configs/decoder/emoji-64px.yaml --config $RUN/stages/decoder.fit.yaml \
    --config $RUN/stages/decoder.features.yaml --config configs/base/decoder-noise.yaml \
    --trainer.logger.init_args.save_dir /tmp/noisy/decoder $MORE > "$OUT/noisy.log" 2>&1
  say "decoder with noise on z_i: $?"
  for name in clip judge store prior ar_prior linear.safetensors codec.safetensors; do ln -sf $RUN/$name /tmp/noisy/; done
  for level in 0.0 0.2 0.4; do
    python3 -c 'import json, sys
run = json.load(open(sys.argv[1]))
run["decoder"]["init_args"] |= {"noise_level": float(sys.argv[2]), "upsamplers": []}
json.dump(run, open("/tmp/noisy/run.json", "w"))' $RUN/run.json $level
    timeout 60 python3 benchmarks/memorisation.py /tmp/noisy --source /tmp/shards --out /tmp/noisy/$level \
      --device "${DEVICE:-cuda}" >> "$OUT/noisy.log" 2>&1
    say "level $level: $? $(grep -A 3 retrieval /tmp/noisy/$level/memorisation.json | tr -d '\n')"
  done
}

second() {
  timeout 200 python3 -m unclip_pl reproduce --config configs/reproduce/small.yaml --run /tmp/small > "$OUT/small.log" 2>&1
  say "small configs: $?"
  (cd /tmp/small && tar czf "$OUT/small.tar.gz" stages)
  grep -h '"steps_per_second"\|"mfu"\|"peak_memory_bytes"' /tmp/small/stages/*.json
  (cd benchmarks && timeout 150 python3 -W ignore gpu.py decoder --out "$OUT/decoder") > "$OUT/decoder.log" 2>&1
  say "the paper's decoder: $?"
  tail -15 "$OUT/decoder.log"
}

install
"$1"
(cd "$OUT" && tar czf "$1.tar.gz" -- *.log *.txt && rm -f -- *.log *.txt)
ls -la "$OUT"
