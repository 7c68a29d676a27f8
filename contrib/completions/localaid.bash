# bash completion for localaid
# shellcheck shell=bash disable=SC2207

_localaid() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} command='' at
    for ((at = 1; at < COMP_CWORD; at++)); do
        case ${COMP_WORDS[at]} in
            -*) ;;
            *)
                command=${COMP_WORDS[at]}
                break
                ;;
        esac
    done
    case $prev in
        --models | --configs | --state | --folder | --out)
            COMPREPLY=($(compgen -d -- "$cur"))
            return
            ;;
        --settings | --key | --new-key)
            COMPREPLY=($(compgen -f -- "$cur"))
            return
            ;;
        --path)
            COMPREPLY=($(compgen -W 'v1/chat v1/completion v1/embeddings v1/rerank' -- "$cur"))
            return
            ;;
        --listen)
            COMPREPLY=($(compgen -W '127.0.0.1:8080 0.0.0.0:8080 unix:/run/localaid/control.sock' -- "$cur"))
            return
            ;;
        --log-format)
            COMPREPLY=($(compgen -W 'auto plain journal json' -- "$cur"))
            return
            ;;
        --api-key | --fd | --serial) return ;;
    esac
    local folders='--models --configs --state --settings --listen --help' options=''
    case $command in
        '') options='--version --help check demo diff doctor explain hash list publish pull serve status update worker' ;;
        serve) options="$folders --log-format" ;;
        check | hash) options=$folders ;;
        diff | doctor) options="$folders --api-key --json" ;;
        list) options="$folders --api-key --all --json" ;;
        status | explain) options="$folders --api-key --json" ;;
        pull) options="$folders --api-key --json --path --cancel" ;;
        update) options="$folders --api-key --json --dry-run" ;;
        publish) options='--key --new-key --out --serial --help' ;;
        demo) options='--listen --folder --once --help' ;;
        worker) options='--fd --help' ;;
    esac
    COMPREPLY=($(compgen -W "$options" -- "$cur"))
    case $command:$cur in
        *:-*) ;;
        publish:*) COMPREPLY+=($(compgen -d -- "$cur")) ;;
        check:* | hash:*) COMPREPLY+=($(compgen -f -- "$cur")) ;;
        explain:*)
            if [[ $prev == explain ]]; then
                COMPREPLY+=($(compgen -W 'v1/chat v1/completion v1/embeddings v1/rerank' -- "$cur"))
            fi
            ;;
    esac
}
complete -o filenames -F _localaid localaid
