
# Disks, points, runs, and files in points are asked of the program.
_fleecefs_points() {
    local -a line found
    line=(${(Q)${(z)LBUFFER}})
    [[ $LBUFFER != *[[:space:]] ]] || line+=('')
    while (( ${#line} )) && [[ ${line[1]:t} != fleecefs ]]; do shift line; done
    found=(${(f)"$(fleecefs complete -- "${(@)line[2,-1]}" 2>/dev/null)"})
    # What stands before the value in the same word is there already.
    [[ ${line[-1]} != --*=* ]] || found=("${(@)found#--*=}")
    if (( ${#found} )); then
        compadd -S '' -a found
    else
        _files
    fi
}
