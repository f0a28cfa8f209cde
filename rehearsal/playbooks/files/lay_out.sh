# Takes home, repository, git_ref, run_id from the environment and the settings on stdin; run by deploy_release.yml.
# Says which of these it did: exported, configured, switched; and `stale` when what was last started is not what lies here.
set -eu
umask 022
cd "$home"
# A play that was killed may leave this script running for a moment: the next one waits for it.
exec 9> .deploy.lock
flock -w 60 9 || { echo "another deployment has held $home for 60 s" >&2; exit 1; }
git --git-dir="$repository" cat-file -e "$git_ref^{commit}" 2>/dev/null ||
    { echo "$git_ref is no commit of $repository; push it there first" >&2; exit 1; }

# REVISION is there only in a folder that is whole, since the folder takes its name last.
release=releases/$git_ref
if [ ! -f "$release/REVISION" ]; then
    rm -rf "$release" "$release.part" "$release.tar"
    mkdir -p "$release.part"
    git --git-dir="$repository" archive --format=tar --output="$release.tar" "$git_ref"
    tar -xf "$release.tar" -C "$release.part"
    rm "$release.tar"
    printf '%s\n' "$git_ref" > "$release.part/REVISION"
    mv -T "$release.part" "$release"
    echo exported
fi

(umask 077 && cat > shared/.env.part)
if cmp -s shared/.env.part shared/env; then
    rm shared/.env.part
else
    mv -T shared/.env.part shared/env
    echo configured
fi

if [ "$(readlink current)" != "$release" ]; then
    ln -sfn "$release" .current.part
    mv -T .current.part current
    echo switched
fi
# Compared by itself: a play that was cut off between the switch and its line still gets that line, once.
if [ "$(tail -n 1 revisions.log 2>/dev/null | cut -d ' ' -f 2)" != "$git_ref" ]; then
    printf '%s %s %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$git_ref" "$run_id" >> revisions.log
fi
[ "$(cat .started-with 2>/dev/null)" = "$git_ref $(sha256sum < shared/env)" ] || echo stale
