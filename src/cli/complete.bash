
# Disks, points, runs, and files in points are asked of the program; all else is in the function above.
_fleecefs_points() {
    local word quoted raw prefix i n words=()
    # Readline takes words apart at colons, and options and their values at '='.
    for ((i = 1; i <= COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]} n=${#words[@]}
        if [[ $word == = && ${COMP_WORDS[i - 1]} == --* ]]; then
            ((i < COMP_CWORD)) || words+=("")
        elif ((n > 0)) && [[ $word == :* || ${words[n - 1]} == *: ]]; then
            words[n - 1]+=$word
        else
            words+=("$word")
        fi
    done
    raw=${words[${#words[@]} - 1]}
    for i in "${!words[@]}"; do
        word=${words[i]#[\"\']}
        [[ $word == "${words[i]}" ]] || word=${word%"${words[i]:0:1}"}
        word=${word//\\/}
        [[ $word != "~/"* ]] || word=$HOME/${word#"~/"}
        words[i]=$word
    done
    COMPREPLY=()
    [[ $raw == -* ]] || mapfile -t COMPREPLY < <("$1" complete -- "${words[@]}" 2>/dev/null)
    if ((${#COMPREPLY[@]} == 0)); then
        _fleecefs "$@"
        return
    fi
    [[ ${#COMPREPLY[@]} -gt 1 || ${COMPREPLY[0]} != *[/:] ]] || compopt -o nospace 2>/dev/null
    prefix=
    [[ $raw != *:* || $COMP_WORDBREAKS != *:* || $raw == [\"\']* ]] || prefix=${raw%"${raw##*:}"}
    prefix=${prefix//\\/}
    for i in "${!COMPREPLY[@]}"; do
        word=${COMPREPLY[i]#"$prefix"}
        if [[ $raw != [\"\']* ]]; then
            printf -v quoted %q "$word" && word=$quoted
        elif [[ $word == *[\\\"\'\`\$\!]* ]]; then
            # Inside quotes a name of a guest's must not end them, or be a command.
            unset "COMPREPLY[i]"
            continue
        fi
        COMPREPLY[i]=$word
    done
    COMPREPLY=("${COMPREPLY[@]}")
}

complete -F _fleecefs_points -o bashdefault -o default fleecefs
