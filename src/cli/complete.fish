
# Points, and files in them, are asked of the program.
complete -c fleecefs -a '(fleecefs complete -- (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null)'
