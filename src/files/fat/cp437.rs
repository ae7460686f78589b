//! The bytes of short names: code page 437, as Linux and mtools take them. Which one a guest had is not on disk.

/// What 0x80 and all above it stand for.
const UPPER: &str = "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀\
    αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u{a0}";

/// The character that a byte stands for.
pub(super) fn character(byte: u8) -> char {
    match byte.checked_sub(0x80) {
        None => char::from(byte),
        Some(upper) => UPPER.chars().nth(usize::from(upper)).unwrap_or('_'),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_for_each_byte() {
        assert_eq!(UPPER.chars().count(), 128);
        let known = [
            (0x41, 'A'),
            (0x80, 'Ç'),
            (0x94, 'ö'),
            (0xc4, '─'),
            (0xe1, 'ß'),
            (0xfd, '²'),
            (0xff, '\u{a0}'),
        ];
        known.iter().for_each(|(byte, c)| assert_eq!(character(*byte), *c));
    }
}
