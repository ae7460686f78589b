
# Disks, points, runs, and files in points are asked of the program.
function __fleecefs_points
    fleecefs complete -- (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null
end
complete -c fleecefs -a '(__fleecefs_points)'
