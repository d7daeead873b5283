#!/bin/bash
# torchrun for one machine or several; a process that dies is started again with the others, from the last checkpoint.
#
#   PROCESSES=4 configs/cluster/torchrun.sh -c configs/segmentation_camvid.yaml --name camvid
#   NODES=2 NODE=0 MASTER_ADDR=10.0.0.1 PROCESSES=4 configs/cluster/torchrun.sh ...    # and NODE=1 on the second
#
# Run folders (trainer.default_root_dir) lie on a file system that all machines share.
set -euo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export DENSECTX_START_TIMEOUT=${DENSECTX_START_TIMEOUT:-120} # seconds: machines do not import everything equally fast
# else restarted workers read the addresses of the dead ones from the store that torchrun shares with them
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
nodes=${NODES:-1} processes=${PROCESSES:-1}
if [ "$nodes" = 1 ]; then
  meet=(--standalone)
else
  # only with this rendezvous do all nodes restart together; whether this node hosts it, and by which address the
  # others reach it, torchrun does not guess reliably
  host=$([ "${NODE:?0 to NODES - 1}" = 0 ] && echo 1 || echo 0)
  way='import socket, sys; s = socket.socket(type=socket.SOCK_DGRAM); s.connect((sys.argv[1], 9)); print(s.getsockname()[0])'
  here=$(python3 -c "$way" "${MASTER_ADDR:?of node 0}")
  meet=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}")
  meet+=(--rdzv-id densectx --rdzv-conf "is_host=$host" --local-addr "$here")
fi
exec torchrun "${meet[@]}" --nproc-per-node "$processes" --max-restarts "${RESTARTS:-3}" --no-python \
  densectx fit "$@" --trainer.num_nodes "$nodes" --trainer.devices "$processes" --trainer.strategy ddp --resume auto
