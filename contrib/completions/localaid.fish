# fish completion for localaid

set -l folders check doctor explain hash list pull serve status

complete -c localaid -f
complete -c localaid -l help -d 'Show help'
complete -c localaid -n __fish_use_subcommand -l version -d 'Print the version'
complete -c localaid -n __fish_use_subcommand -a check -d 'Validate configs and settings without a daemon'
complete -c localaid -n __fish_use_subcommand -a demo -d 'Start a daemon with a small model and ask it a question'
complete -c localaid -n __fish_use_subcommand -a doctor -d 'Look at folders, permissions, limits and memory'
complete -c localaid -n __fish_use_subcommand -a explain -d 'Show where a path and a model name lead, and why'
complete -c localaid -n __fish_use_subcommand -a hash -d 'Print the SHA-256 of files as configs name them'
complete -c localaid -n __fish_use_subcommand -a list -d 'Show every name, its rule and its file'
complete -c localaid -n __fish_use_subcommand -a pull -d 'Download the weights of a model'
complete -c localaid -n __fish_use_subcommand -a serve -d 'Serve the models of some folders to OpenAI clients'
complete -c localaid -n __fish_use_subcommand -a status -d 'Show models, workers and problems of the running daemon'
complete -c localaid -n __fish_use_subcommand -a worker -d 'Serve one model to the daemon (started by it)'

complete -c localaid -n "__fish_seen_subcommand_from $folders" -l models -x -a '(__fish_complete_directories)' -d 'A folder of models'
complete -c localaid -n "__fish_seen_subcommand_from $folders" -l configs -x -a '(__fish_complete_directories)' -d 'Folder of your YAML configs'
complete -c localaid -n "__fish_seen_subcommand_from $folders" -l state -x -a '(__fish_complete_directories)' -d 'Folder for the digest cache'
complete -c localaid -n "__fish_seen_subcommand_from $folders" -l settings -r -d 'Settings file'
complete -c localaid -n "__fish_seen_subcommand_from $folders demo" -l listen -x -d 'HOST:PORT or unix:PATH'
complete -c localaid -n '__fish_seen_subcommand_from serve' -l log-format -x -a 'auto plain journal json' -d 'What log lines look like'
complete -c localaid -n '__fish_seen_subcommand_from doctor explain list pull status' -l api-key -x -d 'API key'
complete -c localaid -n '__fish_seen_subcommand_from doctor explain list pull status' -l json -d 'Print JSON'
complete -c localaid -n '__fish_seen_subcommand_from list' -l all -d 'All files and missing models'
complete -c localaid -n '__fish_seen_subcommand_from pull' -l path -x -a 'v1/chat v1/completion v1/embeddings v1/rerank' -d 'API path'
complete -c localaid -n '__fish_seen_subcommand_from pull' -l cancel -d 'End the download'
complete -c localaid -n '__fish_seen_subcommand_from check hash' -F
complete -c localaid -n '__fish_seen_subcommand_from explain' -a 'v1/chat v1/completion v1/embeddings v1/rerank'
complete -c localaid -n '__fish_seen_subcommand_from demo' -l folder -x -a '(__fish_complete_directories)' -d 'Where the folders lie'
complete -c localaid -n '__fish_seen_subcommand_from demo' -l once -d 'End after the answer'
complete -c localaid -n '__fish_seen_subcommand_from worker' -l fd -x -d 'The socket to the daemon'
