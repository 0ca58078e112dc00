# For the scripts that plant mutants; sourced.

# field N: the Nth of the fields of $entry, which | separates; a | within one is written \|.
field() { printf '%s\n' "$entry" | awk -F' [|] ' -v n="$1" '{ gsub(/\\[|]/, "\1"); $0 = $0; gsub(/\1/, "|", $n); print $n }'; }

# plant FILE NTH: the file with the first line that reads $line, or the nth such, replaced by $replacement.
plant() {
    LINE=$line WITH=$replacement awk -v nth="$2" '
        { bare = $0; sub(/^ +/, "", bare) }
        bare == ENVIRON["LINE"] && ++seen == nth { print ENVIRON["WITH"]; done = 1; next }
        { print }
        END { exit !done }' "$1"
}
