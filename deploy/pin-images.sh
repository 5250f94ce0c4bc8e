#!/bin/sh
# Looks up the digest of each image that docker-compose.yml takes from a registry, and writes them into .env, where
# compose reads them. Run it where the registry can be reached; .env is the machine's own and is not committed.
set -eu
cd "$(dirname "$0")/.."
touch .env
sed -n -e 's/.*\${\([A-Z0-9_]*_IMAGE\):-\([^}]*\)}.*/\1 \2/p' docker-compose.yml | sort -u | while read -r name image; do
  tag=${image%@*}
  docker pull --quiet "$tag" >/dev/null
  digest=$(docker image inspect --format '{{index .RepoDigests 0}}' "$tag")
  [ -n "$digest" ] || { echo "$tag has no digest: was it pulled from a registry?" >&2; exit 1; }
  grep -v "^$name=" .env > .env.new || true
  echo "$name=$tag@${digest#*@}" >> .env.new
  mv .env.new .env
  echo "$name=$tag@${digest#*@}"
done
