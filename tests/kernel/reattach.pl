#!/usr/bin/perl
# Gives an NBD device of the kernel connections to another server when those it has are closed, while it is in use.
# nbd-client 3.24 attaches by netlink but cannot do this. A device attached so can be told to keep its requests until
# it has new connections (DEAD_CONN_TIMEOUT), and to take them (RECONFIGURE); linux/nbd-netlink.h has the messages.
#
# usage: reattach.pl INDEX CONNECTIONS HOST PORT DIRECTORY
#
# It leaves a file in DIRECTORY at each stage: watching, disconnected, reattached.
use strict;
use warnings;
use Socket;

my ($index, $connections, $host, $port, $directory) = @ARGV;

# Seconds: longer than the whole test, as the kernel fails the requests after it.
use constant DEAD_CONN_TIMEOUT => 300;
alarm 180;

# From linux/netlink.h and linux/genetlink.h.
use constant { AF_NETLINK => 16, NETLINK_GENERIC => 16, SOL_NETLINK => 270, NETLINK_ADD_MEMBERSHIP => 1 };
use constant { NLM_F_REQUEST => 1, NLM_F_ACK => 4, NLMSG_ERROR => 2 };
use constant { GENL_ID_CTRL => 16, CTRL_CMD_GETFAMILY => 3 };
use constant { CTRL_ATTR_FAMILY_ID => 1, CTRL_ATTR_FAMILY_NAME => 2, CTRL_ATTR_MCAST_GROUPS => 7 };
use constant { CTRL_ATTR_MCAST_GRP_ID => 2 };
# From linux/nbd-netlink.h.
use constant { NBD_CMD_RECONFIGURE => 3, NBD_CMD_LINK_DEAD => 4 };
use constant { NBD_ATTR_INDEX => 1, NBD_ATTR_SOCKETS => 7, NBD_ATTR_DEAD_CONN_TIMEOUT => 8 };
use constant { NBD_SOCK_ITEM => 1, NBD_SOCK_FD => 1 };

sub reached {
    my ($stage) = @_;
    open my $file, '>', "$directory/$stage" or die "$directory/$stage: $!\n";
    print $file "yes\n";
    close $file or die "$directory/$stage: $!\n";
}

sub netlink {
    socket my $socket, AF_NETLINK, SOCK_RAW, NETLINK_GENERIC or die "netlink socket: $!\n";
    # A socket that has no address yet is not told of events: it has that of their sender, the kernel.
    bind $socket, pack 'S S L L', AF_NETLINK, 0, 0, 0 or die "netlink socket: $!\n";
    return $socket;
}

# An attribute: length, type, value, and zeroes to a multiple of 4.
sub attribute {
    my ($type, $value) = @_;
    return pack 'S S a* x![4]', 4 + length $value, $type, $value;
}

# The attributes in a message, by type.
sub attributes {
    my ($bytes) = @_;
    my %found;
    while (length $bytes >= 4) {
        my ($length, $type) = unpack 'S S', $bytes;
        $found{$type} = substr $bytes, 4, $length - 4;
        my $next = $length + -$length % 4;
        $bytes = $next < length $bytes ? substr $bytes, $next : '';
    }
    return \%found;
}

# The next message: its type, the command, and what follows the two headers. An error is fatal; 0 is the kernel's
# acknowledgement.
sub receive {
    my ($socket) = @_;
    defined recv $socket, my $message, 65536, 0 or die "netlink: $!\n";
    my ($type, $code) = unpack 'x4 S x10 l', $message;
    if ($type == NLMSG_ERROR) {
        local $! = -$code;
        die "the kernel refuses: $!\n" if $code;
    }
    return ($type, unpack 'x16 C x3 a*', $message);
}

sub request {
    my ($socket, $family, $flags, $command, $body) = @_;
    my $message = pack 'S S L L C C S a*', $family, NLM_F_REQUEST | $flags, 1, 0, $command, 1, 0, $body;
    send $socket, pack('L a*', 4 + length $message, $message), 0 or die "netlink: $!\n";
    return receive($socket);
}

sub read_exactly {
    my ($socket, $length) = @_;
    my $bytes = '';
    while (length $bytes < $length) {
        sysread $socket, $bytes, $length - length $bytes, length $bytes or return;
    }
    return $bytes;
}

# A connection that has agreed on the default export, or nothing.
sub connection {
    socket my $socket, AF_INET, SOCK_STREAM, 0 or die "socket: $!\n";
    connect $socket, pack_sockaddr_in($port, inet_aton($host)) or return;
    my $greeting = read_exactly($socket, 18) or return;
    $greeting =~ /^NBDMAGICIHAVEOPT/ or die "the server does not speak newstyle\n";
    # FIXED_NEWSTYLE and NO_ZEROES, then NBD_OPT_EXPORT_NAME with a name of no bytes.
    syswrite $socket, pack 'N a8 N N', 3, 'IHAVEOPT', 1, 0 or return;
    # Size and transmission flags.
    read_exactly($socket, 10) or return;
    return $socket;
}

my $control = netlink();
my (undef, undef, $answer) =
    request($control, GENL_ID_CTRL, 0, CTRL_CMD_GETFAMILY, attribute(CTRL_ATTR_FAMILY_NAME, "nbd\0"));
my $about  = attributes($answer);
my $family = unpack 'S', $about->{+CTRL_ATTR_FAMILY_ID};
my ($group) = map { attributes($_) } values %{attributes($about->{+CTRL_ATTR_MCAST_GROUPS})};

my $events = netlink();
setsockopt $events, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, $group->{+CTRL_ATTR_MCAST_GRP_ID}
    or die "cannot watch the device: $!\n";
my $device = attribute(NBD_ATTR_INDEX, pack 'L', $index);
request($control, $family, NLM_F_ACK, NBD_CMD_RECONFIGURE,
    $device . attribute(NBD_ATTR_DEAD_CONN_TIMEOUT, pack 'Q', DEAD_CONN_TIMEOUT));
reached('watching');

my $dead = 0;
while ($dead < $connections) {
    my ($type, $command, $body) = receive($events);
    $dead++ if $command == NBD_CMD_LINK_DEAD && unpack('L', attributes($body)->{+NBD_ATTR_INDEX}) == $index;
}
reached('disconnected');

# The second server may need a moment more before it serves.
my @sockets;
while (@sockets < $connections) {
    my $socket = connection();
    if ($socket) {
        push @sockets, $socket;
    } else {
        select undef, undef, undef, 0.1;
    }
}
my $items = join '', map { attribute(NBD_SOCK_ITEM, attribute(NBD_SOCK_FD, pack 'L', fileno $_)) } @sockets;
request($control, $family, NLM_F_ACK, NBD_CMD_RECONFIGURE, $device . attribute(NBD_ATTR_SOCKETS, $items));
reached('reattached');
